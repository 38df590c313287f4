"""The manifest of a latent store: what the latents are, and which files hold them."""

import json
import os
import re
from dataclasses import asdict, dataclass, field, fields
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from ditlit.data.folders import Folder, LocalFolder
from ditlit.errors import InputError, counted

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2",
)  # fmt: skip
PIXEL_CHANNELS = (1, 3)  # of latents that are pictures themselves, grey or RGB

# Far beyond any store there is, and small enough to calculate with.
MAX_SIDE = 2**16  # channels, height, width
MAX_CLASSES = 2**24
MAX_BYTES = 2**52
MAX_NUMBER = 1e30
LABEL_BYTES = 8  # of a sample in a file, at least


@dataclass
class Shard:
    """One file of a store: its name in the store's folder, its samples, size in bytes and checksum."""

    file: str
    num_samples: int
    num_bytes: int
    sha256: str


@dataclass
class Manifest:
    """What a store says of itself.

    Args:
        kind: ``moments`` of a VAE's posterior, or ``latents`` (also pixels).
        shape: (C, H, W) of the latents.
        num_classes: number K of classes; labels run from 0 to K-1.
        shards: the files, in order.
        shift: subtracted from raw latents, one value or one for each channel.
        scale: multiplies them afterwards, likewise.
        flipped: whether mirrored images were encoded too.
        class_names: name of each class.
        image_size: side of the encoded images in pixels.
        preprocessing: how images were cropped and resized.
        vae: class, source and weight hash of the VAE; None for pixels.
        labels: the file that holds the labels of all shards; None in older stores.
        version: of this format.
    """

    kind: Literal["moments", "latents"]
    shape: tuple[int, int, int]
    num_classes: int
    shards: list[Shard]
    shift: list[float] = field(default_factory=lambda: [0.0])
    scale: list[float] = field(default_factory=lambda: [1.0])
    flipped: bool = False
    class_names: list[str] | None = None
    image_size: int | None = None
    preprocessing: str | None = None
    vae: dict[str, Any] | None = None
    labels: Shard | None = None
    version: int = FORMAT_VERSION

    @property
    def num_samples(self) -> int:
        return sum(shard.num_samples for shard in self.shards)


def write_manifest(folder: Folder, manifest: Manifest) -> None:
    """Write the manifest, which makes the folder a store: do it last."""
    folder.write(MANIFEST, json.dumps(asdict(manifest), indent=1).encode())


def read_manifest(folder: Folder) -> Manifest:
    """Read and check a manifest.

    Raises:
        InputError: where the store is missing, its manifest unreadable or of another version, or a shard's name leads
            out of the folder.
    """
    where = folder.location(MANIFEST)
    if isinstance(folder, LocalFolder):
        if not (folder.path / MANIFEST).is_file() and holds_images(folder.path):
            raise InputError(
                f"{folder.path} holds images and is no latent store; encode them first, with ditlit encode --images "
                f"{folder.path} --out STORE --vae VAE, and give that store"
            )
        if not folder.path.is_dir():
            raise InputError(f"there is no latent store at {folder.path}: the folder does not exist")
        if not (folder.path / MANIFEST).is_file():
            raise InputError(f"{folder.path} is not a latent store: it has no {MANIFEST} (was its writing cut short?)")
    try:
        content = json.loads(folder.read(MANIFEST))
        version = content["version"]
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{where} is damaged ({error!r}); write the store again") from None
    if version != FORMAT_VERSION:
        raise InputError(f"{where} has format version {version}, this ditlit reads version {FORMAT_VERSION}")
    known = {f.name for f in fields(Manifest)}
    try:
        content["shards"] = [Shard(**shard) for shard in content["shards"]]
        if content.get("labels") is not None:
            content["labels"] = Shard(**content["labels"])
        manifest = Manifest(**{k: v for k, v in content.items() if k in known})
        manifest.shape = tuple(manifest.shape)
    except (TypeError, ValueError, KeyError) as error:
        raise InputError(f"{where} is damaged ({error}); write the store again") from None
    wrong = wrong_field(manifest)
    if wrong is not None:
        raise InputError(f"{where} is damaged (its fields contradict each other: {wrong}); write the store again")
    for shard in [*manifest.shards, *filter(None, [manifest.labels])]:
        if not re.fullmatch("[0-9a-f]{64}", str(shard.sha256)):  # names files in the cache
            raise InputError(f"{where} is damaged (the checksum of {shard.file!r} is none); write the store again")
        if PurePosixPath(shard.file).name != shard.file or shard.file in ("", ".", ".."):
            raise InputError(f"{where} lists the file {shard.file!r}, which leads out of its folder; do not trust it")
    return manifest


def holds_images(path: Path) -> bool:
    """Whether a path is, or the first files below it are, images or archives."""
    files = (name for _, _, names in os.walk(path) for name in names)
    return any(name.lower().endswith((*IMAGE_SUFFIXES, ".tar")) for name in [path.name, *islice(files, 100)])


def wrong_field(manifest: Manifest) -> str | None:
    """The first field that cannot be meant, if any: nothing is allocated or opened on the word of such a manifest."""
    shape, shards, labels = manifest.shape, manifest.shards, manifest.labels
    if manifest.kind not in ("moments", "latents"):
        return f"kind {manifest.kind!r}"
    if len(shape) != 3 or not all(is_count(side, 1, MAX_SIDE) for side in shape):
        return f"shape {shape}"
    if not is_count(manifest.num_classes, 1, MAX_CLASSES):
        return f"num_classes {manifest.num_classes!r}"
    if not isinstance(manifest.flipped, bool):
        return f"flipped {manifest.flipped!r}"
    for shard in (*shards, *([labels] if labels else [])):
        counts = is_count(shard.num_samples, 0, MAX_BYTES) and is_count(shard.num_bytes, 0, MAX_BYTES)
        if not counts or not isinstance(shard.file, str) or LABEL_BYTES * shard.num_samples > shard.num_bytes:
            return f"{shard.num_samples!r} samples in {shard.num_bytes!r} bytes of {shard.file!r}"
    if len({shard.file for shard in shards}) < len(shards):
        return "a shard is listed twice"
    if manifest.num_samples == 0 or (labels and labels.num_samples != manifest.num_samples):
        return "the number of samples"
    for name, values in (("shift", manifest.shift), ("scale", manifest.scale)):
        if not isinstance(values, list) or len(values) not in (1, shape[0]) or not all(map(is_number, values)):
            return f"{name} {values!r}"
    names = manifest.class_names
    if names is not None and not (isinstance(names, list) and len(names) == manifest.num_classes):
        return f"class_names other than a name for each of {counted(manifest.num_classes, 'class')}"
    texts = [*(names or []), *([] if manifest.preprocessing is None else [manifest.preprocessing])]
    if not all(isinstance(text, str) for text in texts):
        return "class_names or preprocessing that are no text"
    if manifest.image_size is not None and not is_count(manifest.image_size, 1, MAX_BYTES):
        return f"image_size {manifest.image_size!r}"
    return None if manifest.vae is None or isinstance(manifest.vae, dict) else f"vae {manifest.vae!r}"


def is_count(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < MAX_NUMBER  # false for NaN
