"""Features of many images: read by worker processes, computed on all devices, written to one file for each layer.

Every process takes each world_size-th batch and the first one writes, in the order of the images. A batch holds the
same images on any number of devices, so the features are the same to the bit.
"""

import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset

from ditlit.data.workers import Loader
from ditlit.errors import InputError
from ditlit.evaluation.extractors import Extractor, Features
from ditlit.evaluation.images import Images
from ditlit.precision import float32_products

USUAL_SIDE = 256  # pixels; batches of larger images come more slowly


class Batches(Dataset):
    """What the workers read; a problem comes as text, since an exception would lose its shape on the way."""

    def __init__(self, images: Images):
        self.images = images

    def __getitem__(self, numbers: Sequence[int]) -> tuple[Tensor, str]:
        try:
            return self.images.load(numbers), ""
        except InputError as error:
            return torch.empty(0), str(error)


def ranks() -> tuple[int, int]:
    """This process's number and the number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def extract(
    images: Images,
    extractor: Extractor,
    layers: Sequence[str],
    folder: Path,
    batch_size: int,
    num_workers: int,
    device: torch.device,
    advance: Callable[[int], None] = lambda n: None,
) -> None:
    """Write ``LAYER.npy`` (n, D) in float32 for each layer, to a folder that only the first process needs to see.

    Raises:
        InputError: on all processes, where an image cannot be read.
    """
    rank, world = ranks()
    n = len(images)
    batches = [range(i, min(i + batch_size, n)) for i in range(0, n, batch_size)]
    mine = batches[rank::world]
    loader = iter(
        Loader(
            Batches(images),
            sampler=[list(batch) for batch in mine],
            num_workers=min(num_workers, len(mine)),
            batch_bytes=batch_size * 3 * USUAL_SIDE**2,
            prefetch_factor=4,
            pin_memory=device.type == "cuda",
        )
    )
    writers: dict[str, np.memmap] = {}
    widths: dict[str, int] = {}
    for turn in range(-(-len(batches) // world)):
        batch, problem = next(loader) if turn < len(mine) else (None, "")
        parts: Features = {}
        if batch is not None and not problem:
            parts = features_of(images.finish(batch.to(device, non_blocking=True)), extractor, layers)
        if not widths:
            widths = agreed({layer: part.shape[1] for layer, part in parts.items()}, problem)
        rows = gathered(parts, widths, batch_size, problem, device)  # (world, batch_size, D)
        if rank == 0:
            for k, batch_rows in enumerate(batches[turn * world : (turn + 1) * world]):
                whole = rows[k, : len(batch_rows)].numpy()
                for layer, columns in zip(
                    widths, np.split(whole, np.cumsum(list(widths.values()))[:-1], 1), strict=True
                ):
                    if layer not in writers:
                        path = folder / f"{layer}.npy"
                        writers[layer] = new_array(path, (n, columns.shape[1]))
                    writers[layer][batch_rows.start : batch_rows.stop] = columns
        if turn < len(mine):
            advance(len(mine[turn]))
    for writer in writers.values():
        writer.flush()


def new_array(path: Path, shape: tuple[int, int]) -> np.memmap:
    """An npy file of float32, mapped, with its space taken: on a full disk a write to the map would kill the process.

    Raises:
        OSError: where the disk has no room for it.
    """
    array = np.lib.format.open_memmap(path, "w+", np.float32, shape)
    try:
        with open(path, "rb+") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except (AttributeError, OSError) as error:  # a system or a file system that cannot is left to its luck
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
    return array


def features_of(images: Tensor, extractor: Extractor, layers: Sequence[str]) -> Features:
    """Features of bytes (N, 3, H, W) in true float32: a GPU's shortened products would show in the third digit."""
    exactly = float32_products(tf32=False)
    with exactly, torch.inference_mode(), torch.autocast(images.device.type, enabled=False):
        return extractor(images, layers)


def agreed(widths: dict[str, int], problem: str) -> dict[str, int]:
    """The layers' widths as the first process that has a batch knows them."""
    _, world = ranks()
    if world == 1:
        if problem:
            raise InputError(problem)
        return widths
    found: list = [None] * world
    dist.all_gather_object(found, (widths, problem))
    for _, text in found:
        if text:
            raise InputError(text)
    return next(w for w, _ in found if w)


def gathered(parts: Features, widths: dict[str, int], batch_size: int, problem: str, device: torch.device) -> Tensor:
    """The rows of all processes (world, batch_size, D) on the CPU, layers side by side."""
    _, world = ranks()
    if world == 1:
        if problem:
            raise InputError(problem)
        return torch.cat([parts[layer].float() for layer in widths], 1).cpu()[None]
    # One column more says that the rows are good: an error of one process must not leave the others waiting.
    whole = torch.zeros(batch_size, sum(widths.values()) + 1, device=device)
    if parts:
        rows = torch.cat([parts[layer].float() for layer in widths], 1)
        whole[: len(rows), :-1] = rows
    whole[:, -1] = float(bool(problem))
    found = [torch.empty_like(whole) for _ in range(world)]
    dist.all_gather(found, whole)
    rows = torch.stack(found).cpu()
    if rows[..., -1].any():
        agreed({}, problem)
    return rows[..., :-1]


def shared_features(
    images: Tensor, extractor: Extractor, layers: Sequence[str], batch_size: int, device: torch.device
) -> Features:
    """Features (N, D) on the CPU of bytes (N, 3, H, W) that all processes hold; they share the work."""
    rank, world = ranks()
    batches = images.split(batch_size)
    mine = {}
    for k in range(rank, len(batches), world):
        found = features_of(batches[k].to(device), extractor, layers)
        mine[k] = {layer: part.float().cpu() for layer, part in found.items()}
    parts: list = [mine]
    if world > 1:
        parts = [None] * world
        dist.all_gather_object(parts, mine)
    merged = {k: found for part in parts for k, found in part.items()}
    return {layer: torch.cat([merged[k][layer] for k in sorted(merged)]) for layer in layers}
