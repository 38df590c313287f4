"""Images to be evaluated, read lazily: those of a folder, of an npz file, or the decodes of a latent store."""

import hashlib
import io
import json
import os
import struct
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ditlit.data.images import PREPROCESSING, SUFFIXES, BrokenImage, decode, preprocess
from ditlit.data.sources import ImageSource, folder_entries
from ditlit.data.store import LatentStore
from ditlit.data.vae import load_autoencoder
from ditlit.errors import InputError
from ditlit.pictures import to_uint8

JOB = "sample.json"  # what ``ditlit sample`` writes beside its images
NPZ_ROWS = 64 << 20  # bytes hashed at once


class Images(Protocol):
    """A set of images in a fixed order.

    Attributes:
        location: file or folder, for messages.
        about: what a report says of them.
    """

    location: str
    about: dict[str, Any]

    def __len__(self) -> int: ...

    def load(self, numbers: Sequence[int]) -> Tensor:
        """What a worker process reads of the images with these numbers: bytes (N, 3, H, W), or latents.

        Raises:
            InputError: naming the image that cannot be read or does not fit the others.
        """
        ...

    def finish(self, batch: Tensor) -> Tensor:
        """Bytes (N, 3, H, W) from what was loaded, on the device that holds it."""
        ...

    def digest(self) -> str:
        """SHA-256 of the content, wherever it lies and whatever its files are called."""
        ...


class FolderImages:
    """Image files below a folder, in the order of their names. Of a ``ditlit sample`` folder, those in ``images``.

    Args:
        folder: of the images.
        size: cut and resize to this side, as encoding does; by default images stay as they are, and must be equal.

    Raises:
        InputError: where there are none, or the job that makes them is not done.
    """

    def __init__(self, folder: Path, size: int | None = None):
        self.location = str(folder)
        self.size = size
        job = next((path for path in (folder / JOB, folder.parent / JOB) if path.is_file()), None)
        if job is not None and job.parent == folder:
            folder = folder / "images"
        entries = sorted(folder_entries(folder, "")) if folder.is_dir() else []
        if not entries:
            raise InputError(f"there are no images in {folder}: no file ends in {', '.join(SUFFIXES)}")
        self.source = ImageSource(folder, [], entries, [0] * len(entries), 1, None)
        first = self._read(0)
        self.shape = tuple(first.shape)
        self.about: dict[str, Any] = {
            "kind": "folder",
            "location": self.location,
            "n": len(entries),
            "size": f"{first.shape[1]}x{first.shape[2]}",
            "resize": "none" if size is None else f"{PREPROCESSING}, {size}x{size}",
        }
        if job is not None:
            self.about["job"] = read_job(job, len(entries))

    def __len__(self) -> int:
        return len(self.source)

    def load(self, numbers: Sequence[int]) -> Tensor:
        images = []
        for i in numbers:
            image = self._read(i)
            if tuple(image.shape) != self.shape:
                sizes = [f"{shape[2]}x{shape[1]}" for shape in (image.shape, self.shape)]
                raise InputError(
                    f"the images in {self.location} are not of one size: {self.source.name(i)!r} is {sizes[0]}, the "
                    f"first is {sizes[1]}; give --reference_size (or --generated_size) to cut and resize them as "
                    "encode does"
                )
            images.append(image)
        return torch.stack(images)

    def finish(self, batch: Tensor) -> Tensor:
        return batch

    def digest(self) -> str:
        def of(i: int) -> bytes:
            return hashlib.sha256(self.source.read(i)).digest()

        digest = hashlib.sha256(f"{len(self)} files, {self.size}".encode())
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
            for start in range(0, len(self), 4096):
                for part in threads.map(of, range(start, min(start + 4096, len(self)))):
                    digest.update(part)
        return digest.hexdigest()

    def _read(self, i: int) -> Tensor:
        try:
            data = self.source.read(i)
            if self.size is not None:
                return preprocess(data, self.size)
            return torch.from_numpy(np.array(decode(data))).permute(2, 0, 1).contiguous()  # (3, H, W)
        except (BrokenImage, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise InputError(f"{self.source.root / self.source.name(i)} cannot be decoded: {error}") from None


def read_job(path: Path, n: int) -> dict[str, Any]:
    """What ``ditlit sample`` was asked for.

    Raises:
        InputError: where some of its images are missing.
    """
    job = json.loads(path.read_text())
    if job.get("num_samples", n) != n:
        raise InputError(
            f"{path.parent} holds {n:,} of the {job['num_samples']:,} images that {path} asks for; run the same "
            "ditlit sample again to make the others"
        )
    if len(job.get("classes", [])) > 20:
        job["classes"] = f"{len(job['classes'])} classes"
    return job


class NpzImages:
    """The images of an npz file in ADM's form: ``arr_0`` (n, H, W, 3), bytes, or floats in [0, 1].

    The array is mapped, not loaded: 50,000 images at 256px take 10 GB. A compressed one is unpacked to a temporary
    file first.

    Raises:
        InputError: where the array has another shape or type.
    """

    def __init__(self, path: Path):
        self.location = str(path)
        self.path = path
        self._unpacked: Any = None
        self._array: np.ndarray | None = None
        array = self.array
        good = array.ndim == 4 and array.shape[3] in (1, 3) and len(array) and array.dtype.kind in "uf"
        if not good or (array.dtype.kind == "u" and array.dtype != np.uint8):
            raise InputError(
                f"{path} holds arr_0 of shape {array.shape} and type {array.dtype}; images are (n, H, W, 3), in uint8"
            )
        self.about = {
            "kind": "npz",
            "location": self.location,
            "n": len(array),
            "size": f"{array.shape[1]}x{array.shape[2]}",
            "resize": "none",
        }

    @property
    def array(self) -> np.ndarray:
        if self._array is None:
            self._array = self._map()
        return self._array

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_array": None, "_unpacked": None}

    def __len__(self) -> int:
        return len(self.array)

    def load(self, numbers: Sequence[int]) -> Tensor:
        images = np.array(self.array[list(numbers)])
        if images.dtype != np.uint8:
            low, high = float(images.min()), float(images.max())
            if not (low >= 0 and high <= 1):
                raise InputError(
                    f"{self.location} holds floats from {low:.4g} to {high:.4g}; images are bytes, or floats in "
                    "[0, 1]: save floor(127.5 x + 128) of images in [-1, 1]"
                )
            images = np.round(255 * images).astype(np.uint8)
        return torch.from_numpy(images).permute(0, 3, 1, 2).expand(-1, 3, -1, -1).contiguous()  # (N, 3, H, W)

    def finish(self, batch: Tensor) -> Tensor:
        return batch

    def digest(self) -> str:
        array = self.array
        digest = hashlib.sha256(f"{array.shape} {array.dtype}".encode())
        rows = max(1, NPZ_ROWS // array[0].nbytes)
        for start in range(0, len(array), rows):
            digest.update(np.ascontiguousarray(array[start : start + rows]))
        return digest.hexdigest()

    def _map(self) -> np.ndarray:
        with zipfile.ZipFile(self.path) as archive:
            info = archive.getinfo("arr_0.npy")
            if info.compress_type == zipfile.ZIP_STORED:
                with open(self.path, "rb") as file:
                    file.seek(info.header_offset)
                    name, extra = struct.unpack("<26xHH", file.read(30))  # lengths in the local header
                return map_npy(self.path, info.header_offset + 30 + name + extra)
            self._unpacked = tempfile.NamedTemporaryFile(suffix=".npy")  # noqa: SIM115 (it lives as long as we do)
            with archive.open(info) as file:
                while block := file.read(NPZ_ROWS):
                    self._unpacked.write(block)
            self._unpacked.flush()
        return map_npy(Path(self._unpacked.name), 0)


def map_npy(path: Path, offset: int) -> np.ndarray:
    """The array of an npy file that begins at this offset of another file."""
    with open(path, "rb") as file:
        file.seek(offset)
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
        return np.memmap(path, dtype, "r", file.tell(), shape, "F" if fortran else "C")


class StoreImages:
    """The decodes of a latent store; of a posterior, those of its mean.

    Args:
        location: of the store.
        vae: folder or hub name of its VAE, instead of the one that the manifest names.
        device: to decode on.
    """

    def __init__(self, location: str, vae: str | None = None, device: torch.device | str = "cpu"):
        self.location = location
        self.store = LatentStore(location)
        manifest = self.store.manifest
        autoencoder = load_autoencoder(manifest.vae, vae).to(torch.device(device))
        self.decode: Callable[[Tensor], Tensor] = autoencoder.decode
        self.about = {
            "kind": "store",
            "location": location,
            "n": len(self.store),
            "size": manifest.image_size,
            "resize": "none",
            "vae": (manifest.vae or {}).get("hash", "pixels"),
            "preprocessing": manifest.preprocessing,
        }

    def __len__(self) -> int:
        return len(self.store)

    def load(self, numbers: Sequence[int]) -> Tensor:
        latents = self.store.gather(torch.tensor(list(numbers)))[self.store.kind]
        return latents.chunk(2, dim=1)[0] if self.store.kind == "moments" else latents  # (N, C, H, W)

    def finish(self, batch: Tensor) -> Tensor:
        return to_uint8(self.decode(batch.float())).expand(-1, 3, -1, -1)

    def digest(self) -> str:
        manifest = self.store.manifest
        parts = [manifest.kind, str((manifest.vae or {}).get("hash")), *(shard.sha256 for shard in manifest.shards)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"decode": None}  # workers only read


def npz_keys(path: Path) -> set[str]:
    """Names of the arrays of an npz file.

    Raises:
        InputError: where it is none.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except (zipfile.BadZipFile, OSError) as error:
        raise InputError(f"{path} cannot be read as an npz file: {error}") from None


def read_npz(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Some arrays of an npz file; files with pickled objects are refused."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {name: np.lib.format.read_array(io.BytesIO(archive.read(f"{name}.npy"))) for name in names}
    except ValueError as error:
        raise InputError(f"{path} holds arrays that cannot be read: {error}") from None
