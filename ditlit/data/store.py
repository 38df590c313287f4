"""The latent store: a folder of shards and a manifest, on a disk or at a URL, read through memory maps.

``manifest.json`` says what the latents are (shape, classes, VAE, shift and scale) and lists the files with their sizes
and SHA-256 checksums: the shards, and ``labels.safetensors`` with the labels of them all, so that what the order of
samples depends on is known before any shard is read.

Latents are stored as the VAE gives them; a reader applies x0 = (latent - shift) * scale.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from ditlit.data.arrays import Array, labels_of, latents_of, manifest_of
from ditlit.data.cache import ShardCache, default_cache
from ditlit.data.folders import Folder, LocalFolder, open_folder, write_atomically
from ditlit.data.manifest import MANIFEST, Manifest, read_manifest, write_manifest
from ditlit.data.shards import (
    ShardArrays,
    check_labels,
    check_size,
    check_sum,
    file_sha256,
    map_shard,
    write_shard,
    write_tensors,
)
from ditlit.errors import InputError, check_positive

LABELS = "labels.safetensors"
VERIFIED = ".verified.json"


def finish_store(folder: Folder, manifest: Manifest, labels: Tensor) -> None:
    """Write the labels (n,) of all samples, list them in the manifest, and write that, which makes shards a store.

    Raises:
        InputError: for other labels than the manifest's shards and classes allow.
    """
    labels = labels.long()
    if len(labels) != manifest.num_samples or len(labels) == 0:
        raise InputError(f"{folder.location('')} has {manifest.num_samples} samples in shards, {len(labels)} labels")
    check_labels(labels, manifest.num_classes, folder.location(LABELS))
    manifest.labels = write_tensors(folder, LABELS, {"labels": labels})
    write_manifest(folder, manifest)


def read_labels(folder: Folder, manifest: Manifest) -> Tensor:
    """Labels (n,) of all samples, from their own file.

    Raises:
        InputError: where that is missing, damaged, or its labels are out of range.
    """
    where = folder.location(manifest.labels.file)
    try:
        data = folder.read(manifest.labels.file)
    except FileNotFoundError:
        raise InputError(f"{where} is missing; copy this file or write the store again") from None
    check_size(len(data), manifest.labels, where)
    check_sum(hashlib.sha256(data).hexdigest(), manifest.labels, where)
    try:
        labels = safetensors.torch.load(data)["labels"]
    except (SafetensorError, KeyError) as error:
        raise InputError(f"{where} holds no labels ({error}); write the store again") from None
    if labels.dtype != torch.int64 or labels.shape != (manifest.num_samples,):
        raise InputError(f"{where} should hold ({manifest.num_samples},) int64 labels; write the store again")
    check_labels(labels, manifest.num_classes, where)
    return labels


def write_store(
    folder: str | Path,
    latents: Array,
    labels: Array,
    num_classes: int,
    flipped: Array | None = None,
    kind: Literal["moments", "latents"] = "latents",
    shard_size: int = 4096,
    **about: Any,
) -> "LatentStore":
    """Write arrays as a store and open it.

    Arrays are tensors, numpy arrays or lists. Everything is checked before the first file is written.

    Args:
        folder: path or URL, created if absent; must not hold a store yet.
        latents: raw latents (n, C, H, W) or moments (n, 2C, H, W), float16, bfloat16 or float32; not yet scaled.
        labels: (n,) integers from 0 to num_classes - 1.
        flipped: the same as ``latents`` for the mirrored images.
        kind: what ``latents`` holds.
        shard_size: samples per file.
        about: more fields of :class:`Manifest`: shift, scale, class_names, image_size, preprocessing, vae. Latents
            without ``vae`` are pixels, of one or three channels.

    Raises:
        InputError: for arrays that do not fit together, labels out of range, NaN or Inf, fields that a store cannot
            have, or a folder in use.
    """
    target = open_folder(folder)
    if MANIFEST in target.names():
        raise InputError(f"{folder} already holds a latent store; delete it or choose another folder")
    check_positive(shard_size=shard_size)
    latents, labels = latents_of(latents, "latents"), labels_of(labels)
    if latents.ndim != 4 or labels.shape != latents.shape[:1] or len(labels) == 0:
        raise InputError(
            f"need latents (n, C, H, W) and labels (n,), got {tuple(latents.shape)} and {tuple(labels.shape)}"
        )
    if flipped is not None:
        flipped = latents_of(flipped, "flipped latents")
        if flipped.shape != latents.shape or flipped.dtype != latents.dtype:
            raise InputError("flipped latents must have the shape and type of the latents")
    channels, h, w = latents.shape[1:]
    if kind == "moments" and channels % 2:
        raise InputError(f"moments need an even number of channels (mean and std), got {channels}")
    shape = (channels // 2 if kind == "moments" else channels, h, w)
    manifest = manifest_of(kind, shape, num_classes, len(labels), flipped=flipped is not None, **about)
    check_labels(labels, manifest.num_classes, str(folder))
    for number, start in enumerate(range(0, len(labels), shard_size)):
        part = slice(start, start + shard_size)
        tensors = {kind: latents[part], "labels": labels[part]}
        if flipped is not None:
            tensors[f"flipped_{kind}"] = flipped[part]
        manifest.shards.append(write_shard(target, number, tensors))
    finish_store(target, manifest, labels)
    return LatentStore(folder)


class LatentStore:
    """A store opened for reading; gathers batches.

    On a disk everything that is cheap to check is checked and all shards are mapped at once. At a URL (s3://, gs://,
    hf://, http://) the manifest and the labels are read, and shards come through a local cache when they are needed.

    Args:
        location: path or URL of the store's folder.
        cache: for the shards of remote stores; by default the one that all runs of this user share.

    Raises:
        InputError: for anything that is missing, truncated, or not as the manifest says; the message names the file.
    """

    def __init__(self, location: str | Path, cache: ShardCache | None = None):
        self.location = str(location)
        self.folder = open_folder(location)
        self.manifest = read_manifest(self.folder)
        self.kind = self.manifest.kind
        self._ends = np.cumsum([shard.num_samples for shard in self.manifest.shards])
        self._starts = self._ends - [shard.num_samples for shard in self.manifest.shards]
        self._mapped: list[ShardArrays] | None = None
        self.cache: ShardCache | None = None
        if isinstance(self.folder, LocalFolder):
            self._mapped = self._map_all(self.folder)
        else:
            self.cache = cache or default_cache()
        if self.manifest.labels is not None:
            self.labels = read_labels(self.folder, self.manifest)  # (n,)
        elif self._mapped is not None:
            self.labels = torch.cat([torch.from_numpy(arrays.labels.copy()) for arrays in self._mapped])
            check_labels(self.labels, self.manifest.num_classes, self.location)
        else:
            raise InputError(
                f"{self.location} has no {LABELS} and can be read only on a disk; copy it there or write it again"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> dict[str, Tensor]:
        """One sample, or a batch of those that a slice or numbers name, as :meth:`gather` gives them; of one sample
        without the first dimension: ``moments`` (2C, H, W) or ``latents`` (C, H, W), and ``labels`` ()."""
        n = len(self)
        if isinstance(index, slice):
            index = torch.arange(*index.indices(n))
        rows = torch.as_tensor(index)
        if (rows.numel() and (rows.is_floating_point() or rows.dtype == torch.bool)) or rows.ndim > 1:
            raise TypeError(f"samples are named by a number, a slice or a sequence of numbers, not {index!r}")
        if ((rows < -n) | (rows >= n)).any():
            raise IndexError(f"{self.location} has the samples 0..{n - 1}, not {index}")
        batch = self.gather(rows.long().reshape(-1) % n if rows.numel() else torch.zeros(1, dtype=torch.long))
        return {name: values[0] if rows.ndim == 0 else values[: len(rows)] for name, values in batch.items()}

    def __repr__(self) -> str:
        about = self.manifest
        shape = " x ".join(map(str, about.shape))
        vae = "pixels" if about.vae is None else f"of {about.vae.get('source', 'a VAE')}"
        return f"LatentStore({self.location!r}: {len(self):,} {self.kind} {shape} {vae}, {about.num_classes:,} classes)"

    def __reduce__(self) -> tuple:
        """Another process opens the store itself, instead of getting a copy of all its arrays."""
        return LatentStore, (self.location, self.cache)

    def gather(self, index: Tensor, flip: Tensor | None = None) -> dict[str, Tensor]:
        """The samples at ``index`` (B,), mirrored where ``flip`` (B,) says so.

        Mirrored encodings are taken where the store has them; otherwise the latents themselves are mirrored.

        Returns:
            ``moments`` (B, 2C, H, W) or ``latents`` (B, C, H, W), raw and in the store's type, and ``labels`` (B,).
        """
        rows = index.numpy()
        flips = np.zeros(len(rows), bool) if flip is None else flip.numpy()
        shard_of = np.searchsorted(self._ends, rows, side="right")
        offsets = rows - self._starts[shard_of]
        stored_flips = flips if self.manifest.flipped else np.zeros_like(flips)
        order = np.lexsort((offsets, stored_flips, shard_of))  # in the order of the files
        groups = 2 * shard_of[order] + stored_flips[order]
        out, dtype = None, None
        for part in np.split(order, np.flatnonzero(np.diff(groups)) + 1):
            values, its_dtype = self._read(shard_of[part[0]], bool(stored_flips[part[0]]), offsets[part])
            if out is None:
                out, dtype = np.empty((len(rows), *values.shape[1:]), values.dtype), its_dtype
            if its_dtype != dtype:
                raise InputError(f"the shards of {self.location} hold different number types: {dtype}, {its_dtype}")
            out[part] = values
        latents = torch.from_numpy(out).view(dtype)
        mirror = torch.from_numpy(flips & ~stored_flips)
        if mirror.any():
            latents[mirror] = latents[mirror].flip(-1)
        return {self.kind: latents, "labels": self.labels[index]}

    def verify(self) -> None:
        """Compare every shard on a disk with its checksum; those of remote stores are compared when they arrive.

        What has been verified is remembered beside the manifest by size and modification time, so that only new or
        changed files are read again. Shows a progress bar where there is more than a gigabyte to read.

        Raises:
            InputError: naming the first shard that differs.
        """
        if not isinstance(self.folder, LocalFolder):
            return
        folder = self.folder.path
        record = folder / VERIFIED
        try:
            known = json.loads(record.read_text())
        except (OSError, ValueError):
            known = {}
        stamps = {}
        for shard in self.manifest.shards:
            stat = (folder / shard.file).stat()
            stamps[shard.file] = [shard.sha256, stat.st_size, stat.st_mtime_ns]
        todo = [shard for shard in self.manifest.shards if known.get(shard.file) != stamps[shard.file]]
        if not todo:
            return
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            sums = pool.map(lambda shard: file_sha256(folder / shard.file), todo)
            small = sum(shard.num_bytes for shard in todo) < 1e9
            sums = tqdm(sums, f"checking {self.location}", len(todo), unit="shard", disable=small)
            for shard, found in zip(todo, sums, strict=True):
                check_sum(found, shard, str(folder / shard.file))
        with contextlib.suppress(OSError):  # a read-only store is verified again next time
            write_atomically(record, json.dumps(stamps).encode())

    def _map_all(self, folder: LocalFolder) -> list[ShardArrays]:
        mapped = [map_shard(folder.path / shard.file, shard, self.manifest) for shard in self.manifest.shards]
        dtypes = {arrays.dtype for arrays in mapped}
        if len(dtypes) > 1:
            raise InputError(f"the shards of {self.location} hold different number types: {sorted(map(str, dtypes))}")
        return mapped

    def _read(self, number: int, flipped: bool, offsets: np.ndarray) -> tuple[np.ndarray, torch.dtype]:
        """Copies of a shard's samples at ``offsets`` (m,), as bits, and their number type."""
        if self._mapped is not None:
            arrays = self._mapped[number]
            return (arrays.flipped if flipped else arrays.latents)[offsets], arrays.dtype
        shard = self.manifest.shards[number]
        with self.cache.open(self.folder, shard) as path:
            arrays = map_shard(path, shard, self.manifest)
            return (arrays.flipped if flipped else arrays.latents)[offsets], arrays.dtype


def mean_latents(batch: dict[str, Tensor]) -> Tensor:
    """Raw latents (B, C, H, W) of a batch in float32; the mean where it holds a posterior's moments."""
    return batch["latents"].float() if "latents" in batch else batch["moments"].float().chunk(2, dim=1)[0]


def per_channel(values: Sequence[float], channels: int) -> Tensor:
    """One value or C of them, as (C, 1, 1) float32."""
    return torch.tensor(values, dtype=torch.float32).expand(channels)[:, None, None].clone()
