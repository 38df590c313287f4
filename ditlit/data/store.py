"""The latent store: a folder of safetensors shards and a manifest, read through memory maps.

``manifest.json`` says what the latents are (shape, classes, VAE, shift and scale) and lists the shards with their sizes
and SHA-256 checksums. A shard ``shard-00000.safetensors`` holds, for its n samples,

- ``moments`` (n, 2C, H, W), mean and standard deviation of the VAE's posterior, or ``latents`` (n, C, H, W);
- ``flipped_moments`` or ``flipped_latents``, the same for the mirrored images, where they were encoded too;
- ``labels`` (n,) int64.

Latents are stored as the VAE gives them; a reader applies x0 = (latent - shift) * scale.
"""

import contextlib
import hashlib
import json
import mmap
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from ditlit.data.folders import write_atomically
from ditlit.data.manifest import MANIFEST, Manifest, Shard, read_manifest, write_manifest
from ditlit.errors import InputError

VERIFIED = ".verified.json"
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "I64": torch.int64}
# numpy has no bfloat16, and a gather only moves bytes.
GATHER_DTYPES = {2: np.uint16, 4: np.uint32, 8: np.int64}


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def write_shard(folder: Path, number: int, tensors: dict[str, Tensor]) -> Shard:
    """Write one shard: to a temporary name, flushed to disk, then renamed, so that a shard is whole or absent."""
    data = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    name = shard_name(number)
    write_atomically(folder / name, data)
    return Shard(name, len(tensors["labels"]), len(data), hashlib.sha256(data).hexdigest())


def write_store(
    folder: str | Path,
    latents: Tensor,
    labels: Tensor,
    num_classes: int,
    flipped: Tensor | None = None,
    kind: Literal["moments", "latents"] = "latents",
    shard_size: int = 4096,
    **about: Any,
) -> "LatentStore":
    """Write arrays as a store and open it.

    Args:
        folder: created if absent; must not hold a store yet.
        latents: raw latents (n, C, H, W) or moments (n, 2C, H, W), float16, bfloat16 or float32; not yet scaled.
        labels: (n,) integers from 0 to num_classes - 1.
        flipped: the same as ``latents`` for the mirrored images.
        kind: what ``latents`` holds.
        shard_size: samples per file.
        about: more fields of :class:`Manifest`: shift, scale, class_names, image_size, preprocessing, vae.

    Raises:
        InputError: for arrays that do not fit together, labels out of range, NaN or Inf, or a folder in use.
    """
    folder = Path(folder)
    if (folder / MANIFEST).exists():
        raise InputError(f"{folder} already holds a latent store; delete it or choose another folder")
    labels = labels.long()
    if latents.ndim != 4 or len(latents) != len(labels) or len(labels) == 0:
        raise InputError(
            f"need latents (n, C, H, W) and labels (n,), got {tuple(latents.shape)} and {tuple(labels.shape)}"
        )
    if flipped is not None and (flipped.shape != latents.shape or flipped.dtype != latents.dtype):
        raise InputError("flipped latents must have the shape and type of the latents")
    if kind == "moments" and latents.shape[1] % 2:
        raise InputError(f"moments need an even number of channels (mean and std), got {latents.shape[1]}")
    check_labels(labels, num_classes, folder)
    for name, array in (("latents", latents), ("flipped latents", flipped)):
        if array is not None and not torch.isfinite(array).all():
            raise InputError(f"the {name} hold NaN or Inf; encode them in a wider type")
    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    for number, start in enumerate(range(0, len(labels), shard_size)):
        part = slice(start, start + shard_size)
        tensors = {kind: latents[part], "labels": labels[part]}
        if flipped is not None:
            tensors[f"flipped_{kind}"] = flipped[part]
        shards.append(write_shard(folder, number, tensors))
    channels, h, w = latents.shape[1:]
    shape = (channels // 2 if kind == "moments" else channels, h, w)
    write_manifest(folder, Manifest(kind, shape, num_classes, shards, flipped=flipped is not None, **about))
    return LatentStore(folder)


class LatentStore:
    """A store opened for reading: checks everything that is cheap to check, maps the shards, gathers batches.

    Args:
        folder: of the store.

    Raises:
        InputError: for anything that is missing, truncated, or not as the manifest says; the message names the file.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self.kind = self.manifest.kind
        self._ends = np.cumsum([shard.num_samples for shard in self.manifest.shards])
        self._arrays: list[dict[str, np.ndarray]] = []
        labels = []
        dtypes = set()
        for shard in self.manifest.shards:
            arrays, dtype = self._map(shard)
            labels.append(torch.from_numpy(arrays.pop("labels").copy()))
            check_labels(labels[-1], self.manifest.num_classes, self.folder / shard.file)
            self._arrays.append(arrays)
            dtypes.add(dtype)
        if len(dtypes) > 1:
            raise InputError(f"the shards of {self.folder} hold different number types: {sorted(map(str, dtypes))}")
        self.dtype = dtypes.pop()
        self.labels = torch.cat(labels)  # (n,)

    def __len__(self) -> int:
        return len(self.labels)

    def gather(self, index: Tensor, flip: Tensor | None = None) -> dict[str, Tensor]:
        """The samples at ``index`` (B,), mirrored where ``flip`` (B,) says so.

        Mirrored encodings are taken where the store has them; otherwise the latents themselves are mirrored.

        Returns:
            ``moments`` (B, 2C, H, W) or ``latents`` (B, C, H, W), raw and in the store's type, and ``labels`` (B,).
        """
        rows = index.numpy()
        flips = np.zeros(len(rows), bool) if flip is None else flip.numpy()
        shard_of = np.searchsorted(self._ends, rows, side="right")
        offsets = rows - np.concatenate([[0], self._ends])[shard_of]
        sample_shape = self._arrays[0][self.kind].shape[1:]
        out = np.empty((len(rows), *sample_shape), GATHER_DTYPES[self.dtype.itemsize])
        stored_flips = flips if self.manifest.flipped else np.zeros_like(flips)
        order = np.lexsort((offsets, shard_of, stored_flips))  # in the order of the files
        groups = 2 * shard_of[order] + stored_flips[order]
        for part in np.split(order, np.flatnonzero(np.diff(groups)) + 1):
            name = f"flipped_{self.kind}" if stored_flips[part[0]] else self.kind
            out[part] = self._arrays[shard_of[part[0]]][name][offsets[part]]
        latents = torch.from_numpy(out).view(self.dtype)
        mirror = torch.from_numpy(flips & ~stored_flips)
        if mirror.any():
            latents[mirror] = latents[mirror].flip(-1)
        return {self.kind: latents, "labels": self.labels[index]}

    def verify(self) -> None:
        """Compare every shard with its checksum.

        What has been verified is remembered beside the manifest by size and modification time, so that only new or
        changed files are read again. Shows a progress bar where there is more than a gigabyte to read.

        Raises:
            InputError: naming the first shard that differs.
        """
        record = self.folder / VERIFIED
        try:
            known = json.loads(record.read_text())
        except (OSError, ValueError):
            known = {}
        stamps = {}
        for shard in self.manifest.shards:
            stat = (self.folder / shard.file).stat()
            stamps[shard.file] = [shard.sha256, stat.st_size, stat.st_mtime_ns]
        todo = [shard for shard in self.manifest.shards if known.get(shard.file) != stamps[shard.file]]
        if not todo:
            return
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            sums = pool.map(lambda shard: file_sha256(self.folder / shard.file), todo)
            small = sum(shard.num_bytes for shard in todo) < 1e9
            sums = tqdm(sums, f"checking {self.folder}", len(todo), unit="shard", disable=small)
            for shard, found in zip(todo, sums, strict=True):
                if found != shard.sha256:
                    raise InputError(
                        f"{self.folder / shard.file} is corrupt: its SHA-256 is {found[:16]}..., the manifest says "
                        f"{shard.sha256[:16]}...; copy or encode this shard again"
                    )
        with contextlib.suppress(OSError):  # a read-only store is verified again next time
            write_atomically(record, json.dumps(stamps).encode())

    def _map(self, shard: Shard) -> tuple[dict[str, np.ndarray], torch.dtype]:
        """Memory-mapped arrays of one shard, and the number type of its latents."""
        path = self.folder / shard.file
        try:
            size = path.stat().st_size
        except OSError:
            raise InputError(f"{path} is missing; copy or encode this shard again") from None
        if size != shard.num_bytes:
            raise InputError(
                f"{path} has {size} bytes where the manifest says {shard.num_bytes}: it is truncated or "
                "another file; copy or encode this shard again"
            )
        with open(path, "rb") as file:
            # Copy-on-write: pages are shared and read on demand, and nothing can write to the file.
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        try:
            length = int.from_bytes(memory[:8], "little")
            header = json.loads(memory[8 : 8 + length])
        except ValueError:
            raise InputError(f"{path} is corrupt: it has no readable header; copy or encode this shard again") from None
        c, h, w = self.manifest.shape
        sample_shape = (2 * c if self.kind == "moments" else c, h, w)
        expected = {"labels": (), self.kind: sample_shape}
        if self.manifest.flipped:
            expected[f"flipped_{self.kind}"] = sample_shape
        arrays = {}
        for name, shape in expected.items():
            entry = header.get(name, {})
            if entry.get("dtype") not in DTYPES or tuple(entry.get("shape", ())) != (shard.num_samples, *shape):
                raise InputError(
                    f"{path} should hold {name!r} of shape {(shard.num_samples, *shape)}, but has "
                    f"{entry.get('dtype', 'nothing')} {tuple(entry.get('shape', ()))}; write the store again"
                )
            start, end = entry["data_offsets"]
            dtype = GATHER_DTYPES[DTYPES[entry["dtype"]].itemsize]
            flat = np.frombuffer(memory, np.uint8, end - start, 8 + length + start)
            arrays[name] = flat.view(dtype).reshape(entry["shape"])
        return arrays, DTYPES[header[self.kind]["dtype"]]


def check_labels(labels: Tensor, num_classes: int, where: Path) -> None:
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise InputError(f"{where}: labels run from {low} to {high}, but must lie in 0..{num_classes - 1}")


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def per_channel(values: Sequence[float], channels: int) -> Tensor:
    """One value or C of them, as (C, 1, 1) float32."""
    return torch.tensor(values, dtype=torch.float32).expand(channels)[:, None, None].clone()
