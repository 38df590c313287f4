"""Images and statistics in npz files, as the ADM evaluator has them, mapped instead of loaded."""

import hashlib
import io
import struct
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ditlit.errors import InputError
from ditlit.evaluation.images import JOB, read_job

SAMPLES = "samples.npz"  # what ``ditlit sample --save npz`` writes
BLOCK = 64 << 20  # bytes hashed or unpacked at once


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
        if path.name == SAMPLES and (path.parent / JOB).is_file():
            self.about["job"] = read_job(path.parent / JOB, len(array))

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
        rows = max(1, BLOCK // array[0].nbytes)
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
                while block := file.read(BLOCK):
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
