"""One shard of a latent store: a safetensors file with the arrays of its samples.

A shard ``shard-00000.safetensors`` holds, for its n samples,

- ``moments`` (n, 2C, H, W), mean and standard deviation of the VAE's posterior, or ``latents`` (n, C, H, W);
- ``flipped_moments`` or ``flipped_latents``, the same for the mirrored images, where they were encoded too;
- ``labels`` (n,) int64.
"""

import hashlib
import itertools
import json
import math
import mmap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from ditlit.data.folders import Folder
from ditlit.data.manifest import Manifest, Shard
from ditlit.errors import InputError

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
# numpy has no bfloat16, and a gather only moves bytes.
GATHER_DTYPES = {2: np.uint16, 4: np.uint32}


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def write_shard(
    folder: Folder, number: int, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> Shard:
    """Write one shard, which appears in the folder whole or not at all.

    Args:
        folder: of the store.
        number: of the shard, from 0.
        tensors: its arrays; ``labels`` (n,) among them. No samples at all are legal.
        metadata: goes into the header of the file.
    """
    return write_tensors(folder, shard_name(number), tensors, metadata)


def write_tensors(
    folder: Folder, name: str, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> Shard:
    data = save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata)
    folder.write(name, data)
    return Shard(name, len(tensors["labels"]), len(data), hashlib.sha256(data).hexdigest())


@dataclass
class ShardArrays:
    """The arrays of a shard, most often views of a memory map.

    Args:
        latents: ``moments`` (n, 2C, H, W) or ``latents`` (n, C, H, W), as unsigned integers of the type's width.
        flipped: the same for the mirrored images, where the store has them.
        labels: (n,) int64.
        dtype: number type of the latents.
    """

    latents: np.ndarray
    flipped: np.ndarray | None
    labels: np.ndarray
    dtype: torch.dtype


def map_shard(path: Path, shard: Shard, manifest: Manifest) -> ShardArrays:
    """Memory-map a file as the shard of a manifest.

    Raises:
        InputError: where it is missing, or not what the manifest says.
    """
    try:
        with open(path, "rb") as file:
            check_size(file.seek(0, 2), shard, str(path))
            # Copy-on-write: pages are shared and read on demand, and nothing can write to the file.
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except FileNotFoundError:
        raise InputError(f"{path} is missing; copy or encode this shard again") from None
    except (OSError, ValueError) as error:  # a folder, an empty file
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} cannot be read ({error}); copy or encode this shard again") from None
    return parse_shard(memory, shard, manifest, str(path))


def parse_shard(data: mmap.mmap | bytes, shard: Shard, manifest: Manifest, where: str) -> ShardArrays:
    """The arrays in a shard's bytes, checked against the manifest and not copied; ``where`` is named in errors.

    Raises:
        InputError: for an unreadable header, or other arrays, shapes or types.
    """
    c, h, w = manifest.shape
    shape = (shard.num_samples, 2 * c if manifest.kind == "moments" else c, h, w)
    expected = {manifest.kind: shape, "labels": (shard.num_samples,)}
    if manifest.flipped:
        expected[f"flipped_{manifest.kind}"] = shape
    start, header = read_header(data, where)
    arrays, spans = {}, []
    for name, shape in expected.items():
        entry = header.get(name)
        entry = entry if isinstance(entry, dict) else {}
        dtypes = ("I64",) if name == "labels" else tuple(DTYPES)
        if entry.get("dtype") not in dtypes or entry.get("shape") != list(shape):
            raise InputError(
                f"{where} should hold {name!r} of shape {shape}, but has "
                f"{entry.get('dtype', 'nothing')} {entry.get('shape', [])}; write the store again"
            )
        dtype = np.int64 if name == "labels" else GATHER_DTYPES[DTYPES[entry["dtype"]].itemsize]
        first, end = span_of(entry.get("data_offsets"), where)
        if end - first != math.prod(shape) * np.dtype(dtype).itemsize or start + end > len(data):
            raise contradiction(where)
        flat = np.frombuffer(data, np.uint8, end - first, start + first)
        arrays[name] = flat.view(dtype).reshape(shape)
        spans.append((first, end))
    spans.sort()
    if any(end > first for (_, end), (first, _) in itertools.pairwise(spans)):
        raise contradiction(where)
    flipped = arrays.get(f"flipped_{manifest.kind}")
    if flipped is not None and header[f"flipped_{manifest.kind}"]["dtype"] != header[manifest.kind]["dtype"]:
        raise InputError(f"{where} holds latents and flipped latents of different types; write the store again")
    return ShardArrays(arrays[manifest.kind], flipped, arrays["labels"], DTYPES[header[manifest.kind]["dtype"]])


def read_header(data: mmap.mmap | bytes, where: str) -> tuple[int, dict]:
    """Where the arrays of a safetensors file start, and its header."""
    try:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        if not isinstance(header, dict):
            raise ValueError
    except (ValueError, RecursionError):
        raise InputError(f"{where} is corrupt: it has no readable header; copy or encode this shard again") from None
    return 8 + length, header


def span_of(offsets: object, where: str) -> tuple[int, int]:
    """First byte of an array and the one past its last, as the header gives them."""
    if not isinstance(offsets, list) or len(offsets) != 2 or any(type(offset) is not int for offset in offsets):
        raise contradiction(where)
    first, end = offsets
    if not 0 <= first <= end:
        raise contradiction(where)
    return first, end


def contradiction(where: str) -> InputError:
    return InputError(f"{where} is corrupt: its header contradicts itself; encode this shard again")


def check_size(size: int, shard: Shard, where: str) -> None:
    if size != shard.num_bytes:
        raise InputError(
            f"{where} has {size} bytes where the manifest says {shard.num_bytes}: it is truncated or another file; "
            "copy or encode this shard again"
        )


def check_sum(found: str, shard: Shard, where: str) -> None:
    if found != shard.sha256:
        raise InputError(
            f"{where} is corrupt: its SHA-256 is {found[:16]}..., the manifest says {shard.sha256[:16]}...; "
            "copy or encode this shard again"
        )


def check_labels(labels: Tensor, num_classes: int, where: str) -> None:
    if len(labels) == 0:
        return
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise InputError(f"{where}: labels run from {low} to {high}, but must lie in 0..{num_classes - 1}")


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
