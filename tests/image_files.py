"""Pictures, folders and archives that tests write, and what a source finds in them."""

import io
import tarfile

import numpy as np
from PIL import Image

RED = (200, 30, 60)


def encoded(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format=format, **options)
    return file.getvalue()


def quadrants(size=32):
    """Four colours, so that any rotation or mirroring shows."""
    pixels = np.zeros((size, size, 3), np.uint8)
    half = size // 2
    pixels[:half, :half], pixels[:half, half:], pixels[half:, :half], pixels[half:, half:] = (
        RED, (10, 220, 40), (0, 0, 250), (255, 255, 255),
    )  # fmt: skip
    return Image.fromarray(pixels)


def listing(source):
    return {source.name(i): (int(source.labels[i]), source.read(i)) for i in range(len(source))}


def write_files(root, files):
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def write_tar(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
