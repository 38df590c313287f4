"""Bytes of pictures: rounding, grids, and files that are whole or absent."""

import math
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.functional import InterpolationMode, pil_to_tensor, resize, to_pil_image
from torchvision.utils import make_grid

from ditlit.errors import InputError

PADDING = 2
HEADER = 16  # pixels above a sheet for the names of its columns
WIDEST = 14  # letters of a line beside a row
LINE = 12  # pixels of such a line


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] as bytes, rounded: truncating would darken every picture by half a grey level."""
    return (127.5 * images + 128).clamp(0, 255).to(torch.uint8)


def check_decoded(images: Tensor, indices: Sequence[int]) -> None:
    """Raise InputError for decoded images (N, C, H, W) that are not finite, which names the first by its number."""
    bad = (~images.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
    if bad:
        raise InputError(
            f"image {int(indices[bad[0]])} is not finite once it is decoded, one of {len(bad)} such among "
            f"{len(images)}, though its latents are: the VAE overflows on them; lower the guidance scale"
        )


def enlarged(images: Tensor, min_side: int) -> Tensor:
    """Images (n, C, H, W) repeated pixel by pixel until no side is shorter than ``min_side``."""
    factor = -(-min_side // min(images.shape[-2:]))
    size = [factor * side for side in images.shape[-2:]]
    return resize(images, size, InterpolationMode.NEAREST) if factor > 1 else images


def grid_of(images: Tensor, per_row: int, min_side: int = 64) -> Tensor:
    """Bytes (n, 1 or 3, H, W) as one picture (3, H', W'), small ones enlarged to be looked at."""
    return make_grid(enlarged(images, min_side), nrow=per_row, padding=PADDING, pad_value=255)


def with_header(grid: Tensor, columns: Sequence[str]) -> Tensor:
    """A grid (3, H, W) with a name above each of its columns."""
    picture = Image.new("RGB", (grid.shape[2], grid.shape[1] + HEADER), "white")
    picture.paste(to_pil_image(grid), (0, HEADER))
    draw = ImageDraw.Draw(picture)
    width = (grid.shape[2] - PADDING) / len(columns)
    for i, name in enumerate(columns):
        draw.text((PADDING + (i + 0.5) * width, HEADER / 2), name, fill="black", anchor="mm")
    return pil_to_tensor(picture)


def with_captions(grid: Tensor, rows: Sequence[str]) -> Tensor:
    """A grid (3, H, W) with a text on the right of each of its rows, in as many lines as there is room for."""
    font = ImageFont.load_default()
    height = (grid.shape[1] - PADDING) / len(rows)
    lines = max(1, int(height // LINE))
    texts = ["\n".join(textwrap.wrap(row, WIDEST, max_lines=lines, placeholder="…")) for row in rows]
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    width = max(math.ceil(draw.multiline_textbbox((0, 0), text, font)[2]) for text in texts) + 3 * PADDING
    picture = Image.new("RGB", (grid.shape[2] + width, grid.shape[1]), "white")
    picture.paste(to_pil_image(grid), (0, 0))
    draw = ImageDraw.Draw(picture)
    for i, text in enumerate(texts):
        middle = (grid.shape[2] + PADDING, PADDING / 2 + (i + 0.5) * height)
        draw.multiline_text(middle, text, "black", font, anchor="lm", spacing=1)
    return pil_to_tensor(picture)


def save_png(image: Tensor, path: Path) -> None:
    """Write bytes (C, H, W) as a PNG that is whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    to_pil_image(image).save(temporary, format="PNG")
    os.replace(temporary, path)


def save_animation(frames: Sequence[Tensor], path: Path, seconds_a_frame: float) -> None:
    """Write bytes (3, H, W) as frames of an endless animated WebP; the last one stands longer."""
    first, *rest = [to_pil_image(frame) for frame in frames]
    durations = [round(1000 * seconds_a_frame)] * len(rest) + [2000]
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    first.save(temporary, format="WEBP", save_all=True, append_images=rest, duration=durations, loop=0, quality=90)
    os.replace(temporary, path)


def read_png(path: Path) -> Tensor:
    """Bytes (C, H, W)."""
    with Image.open(path) as image:
        return pil_to_tensor(image)
