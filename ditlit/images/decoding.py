"""From the bytes of an image file to the pixels that everything sees: encoding, and real images in evaluation."""

import io
import re
import warnings

import numpy as np
import torch
from PIL import Image
from torch import Tensor

PREPROCESSING = "EXIF rotation, alpha over white, RGB, halved by box filter, bicubic to the short side, centre crop"
MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP  ")  # how such files begin
MAGIC_BYTES = 12  # of a file that tell whether it is an image
ORIENTATION = 0x0112  # EXIF tag
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # what turns an image of each orientation upright
LONGEST = 16  # long by short side of what is resized


class BrokenImage(Exception):
    """An image file that cannot be decoded; the message says why."""


def is_image_data(head: bytes) -> bool:
    """Whether the first ``MAGIC_BYTES`` of a file are those of an image, for files whose name does not tell."""
    return head.startswith(MAGIC) or head[8:12] == b"WEBP" or head[4:12] in (b"ftypavif", b"ftypavis")


def preprocess(data: bytes, size: int) -> Tensor:
    """Decode an image file, crop and resize it: bytes (3, size, size).

    Raises:
        BrokenImage: where the file is no image, truncated, absurdly large, or of a kind without a common 8-bit meaning.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged EXIF tags, which do not matter
            image = center_crop(decode(data), size)
    except (BrokenImage, MemoryError):  # the memory is the machine's
        raise
    except Exception as error:  # decoders raise anything: OSError, SyntaxError, struct.error, DecompressionBombError
        said = re.sub(r" ?<[^<>]* at 0x[0-9a-fA-F]+>", "", str(error))  # the same in every run
        raise BrokenImage(f"{type(error).__name__}: {said}") from None
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()  # (3, size, size)


def short_side(data: bytes) -> int:
    """Pixels along the shorter side of an image that can be decoded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return min(Image.open(io.BytesIO(data)).size)


def decode(data: bytes) -> Image.Image:
    """The image in 8-bit RGB, upright. Transparent parts show white; 16-bit greys keep their upper byte."""
    image = upright(Image.open(io.BytesIO(data)))
    if image.mode.startswith("I"):  # 16 bits a pixel, in 16 or 32 depending on the format
        grey = np.asarray(image)
        if grey.min() < 0 or grey.max() > 65535:
            raise BrokenImage(f"grey values from {grey.min()} to {grey.max()} do not fit 16 bits")
        image = Image.fromarray(np.round(grey / 257).astype(np.uint8))
    elif image.mode == "F":
        raise BrokenImage("floating-point pixels have no fixed range; convert the file to 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF data say; as it is where they cannot be read."""
    image.load()  # whatever this raises is of the pixels
    try:
        turn = UPRIGHT.get(image.getexif().get(ORIENTATION))
    except Exception:  # struct.error, SyntaxError, ValueError, ...
        return image
    return image if turn is None else image.transpose(turn)


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The central square, ``size`` pixels a side, as Dhariwal & Nichol (2021) cut it: halve with a box filter while
    the short side is at least twice too long, go the rest with a bicubic filter, cut out the middle.

    Of longer strips than any photograph only the middle is resized: enlarged as a whole they would fill the memory.
    """
    image = middle(image, LONGEST * min(image.size))
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def middle(image: Image.Image, longest: int) -> Image.Image:
    """The image, cut at both ends alike where a side is longer than this (or than one more, to keep its centre)."""
    left, top = (max(0, side - longest) // 2 for side in image.size)
    return image.crop((left, top, image.width - left, image.height - top)) if left or top else image
