"""Encoding images to the shards of a latent store: which shards, from which images, and what is known of each."""

import hashlib
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import safetensors.torch
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ditlit.data.folders import Folder
from ditlit.data.manifest import Shard
from ditlit.data.shards import shard_name, write_shard
from ditlit.data.workers import Loader
from ditlit.errors import InputError
from ditlit.images.decoding import BrokenImage, preprocess, short_side
from ditlit.images.sources import ImageSource
from ditlit.images.vae import Autoencoder

METADATA = "encoding"  # key of our entry in a shard's header


@dataclass
class Written:
    """A shard that lies in the store.

    Attributes:
        shard: its entry in the manifest.
        labels: (n,).
        shape: of one sample's moments (2C, H, W) or latents (C, H, W).
        skipped: names of the broken images that it leaves out, and why.
        sums: (2, C) float64, sums of the raw latents and of their squares over samples, flips and positions; for
            moments the expected ones over the posterior.
        enlarged: how many of its images were smaller than what is encoded.
    """

    shard: Shard
    labels: Tensor
    shape: tuple[int, int, int]
    skipped: dict[str, str]
    sums: np.ndarray
    enlarged: int = 0


def plan(num_images: int, shard_size: int, shuffle: bool) -> list[np.ndarray]:
    """Numbers of the images of each shard.

    Images are shuffled once, by a fixed permutation, so that every shard is a random sample of the whole: readers that
    see only a few shards at a time still see all classes.
    """
    order = np.random.default_rng(0).permutation(num_images) if shuffle else np.arange(num_images)
    return np.split(order, range(shard_size, num_images, shard_size))


@dataclass
class Decoded:
    """A batch of images.

    Attributes:
        images: bytes (n, 3, size, size) of the good ones.
        good: their numbers.
        broken: why others cannot be decoded, by number.
        enlarged: how many of the good ones had a shorter side than ``size``.
    """

    images: Tensor
    good: list[int]
    broken: dict[int, str]
    enlarged: int


class Batches(Dataset):
    """Reads and decodes whole batches.

    Attributes:
        failures: why a worker cannot go on, told at once and not when its batch has its turn.
    """

    def __init__(self, source: ImageSource, image_size: int):
        self.source = source
        self.image_size = image_size
        self.failures = multiprocessing.SimpleQueue()

    def __getitem__(self, numbers: Sequence[int]) -> Decoded:
        """Decode the images with these numbers.

        Raises:
            InputError: where the machine, and not the content of a file, is the reason that an image cannot be had.
        """
        size = self.image_size
        images, good, broken, enlarged = [], [], {}, 0
        for i in numbers:
            try:
                data = self.source.read(i)
                images.append(preprocess(data, size))
                good.append(i)
                enlarged += short_side(data) < size
            except BrokenImage as error:
                broken[i] = str(error)
            except (OSError, MemoryError) as error:
                why = getattr(error, "strerror", None) or repr(error)
                reason = f"cannot read {self.source.name(i)!r}: {why}. What is written is kept: run the command again"
                self.failures.put(reason)
                raise InputError(reason) from error
        return Decoded(
            torch.stack(images) if images else torch.empty(0, 3, size, size, dtype=torch.uint8), good, broken, enlarged
        )


@dataclass
class ShardEncoder:
    """Encodes shards, one after the other, while workers decode images ahead and a thread writes behind.

    Args:
        source: of the images.
        folder: of the store.
        vae: on its device.
        image_size: side of the encoded square in pixels.
        flips: encode mirrored images too.
        dtype: of the stored latents.
        batch_size: images that the VAE encodes at once.
        num_workers: processes that decode images; 0 decodes between batches.
        skip_broken: leave out images that cannot be decoded; otherwise their shards are not written.
        device: of the VAE.
        autocast: context in which the VAE computes.
    """

    source: ImageSource
    folder: Folder
    vae: Autoencoder
    image_size: int
    flips: bool
    dtype: torch.dtype
    batch_size: int
    num_workers: int
    skip_broken: bool
    device: torch.device
    autocast: Callable[[], AbstractContextManager]

    def __post_init__(self):
        self.broken: dict[str, str] = {}  # image -> why, of all shards so far
        self.waited = 0.0  # seconds in which the VAE had nothing to do

    def run(self, shards: dict[int, np.ndarray], advance: Callable[[int], None]) -> Iterator[tuple[int, Written]]:
        """Encode the given shards: their number, and the numbers of their images.

        Args:
            shards: to encode.
            advance: called with the number of images done, after every batch.

        Yields:
            Each shard when it is in the store.

        Raises:
            InputError: where a latent does not fit the stored type, or a worker cannot go on or is gone.
        """
        # A batch never reaches over the end of a shard: the same images meet the same kernels however shards are
        # dealt out to processes, and whichever of them were there already.
        parts = {k: np.split(i, range(self.batch_size, len(i), self.batch_size)) for k, i in shards.items()}
        decoder = Batches(self.source, self.image_size)
        loader = Loader(
            decoder,
            sampler=[batch.tolist() for k in parts for batch in parts[k]],
            num_workers=self.num_workers,
            batch_bytes=self.batch_size * 3 * self.image_size**2,
            prefetch_factor=4,
            pin_memory=self.device.type == "cuda",
        )
        batches = iter(loader)
        with ThreadPoolExecutor(1) as writer:
            writing: tuple[int, Future] | None = None
            for number, numbers in parts.items():
                encoded: list[dict[str, Tensor]] = []
                skipped: dict[str, str] = {}
                enlarged = 0
                for batch in numbers:
                    start = time.perf_counter()
                    decoded = next(batches)
                    self.waited += time.perf_counter() - start
                    if not decoder.failures.empty():
                        raise InputError(decoder.failures.get())
                    skipped |= {self.source.name(i): why for i, why in decoded.broken.items()}
                    enlarged += decoded.enlarged
                    encoded.append(self.encode(decoded.images, decoded.good))
                    advance(len(batch))
                self.broken |= skipped
                if writing is not None:
                    yield writing[0], writing[1].result()
                    writing = None
                if not skipped or self.skip_broken:
                    tensors = {name: torch.cat([part[name] for part in encoded]) for name in encoded[0]}
                    writing = number, writer.submit(self.write, number, tensors, skipped, enlarged)
            if writing is not None:
                yield writing[0], writing[1].result()

    def encode(self, images: Tensor, numbers: list[int]) -> dict[str, Tensor]:
        """The tensors of a shard for a batch of images (n, 3, S, S), bytes."""
        kind = self.vae.kind
        images = images.to(self.device, non_blocking=True)
        if not numbers:  # all broken; one black picture tells the shape
            images = images.new_zeros(1, *images.shape[1:])
        tensors = {kind: images} | ({f"flipped_{kind}": images.flip(-1)} if self.flips else {})
        for name, pictures in tensors.items():
            with self.autocast():
                latents = self.vae.encode(pictures)
            latents = latents[: len(numbers)].to(self.dtype).cpu()
            finite = torch.isfinite(latents).flatten(1).all(1)
            if not finite.all():
                name = self.source.name(numbers[int((~finite).nonzero()[0])])
                raise InputError(
                    f"the latents of {name!r} hold NaN or Inf; encode with --precision bf16 or 32, or store with "
                    "--dtype float32"
                )
            tensors[name] = latents
        return tensors | {"labels": torch.from_numpy(self.source.labels[numbers])}

    def write(self, number: int, tensors: dict[str, Tensor], skipped: dict[str, str], enlarged: int) -> Written:
        sums = channel_sums(tensors, self.vae.kind)
        about = json.dumps({"skipped": skipped, "sums": sums.tolist(), "enlarged": enlarged})
        shard = write_shard(self.folder, number, tensors, {METADATA: about})
        return Written(shard, tensors["labels"], tuple(tensors[self.vae.kind].shape[1:]), skipped, sums, enlarged)


def read_back(folder: Folder, number: int, kind: str) -> Written | None:
    """What is known of a shard of an earlier run; None where it is not whole, and has to be encoded again."""
    data = folder.read(shard_name(number))
    try:
        tensors = safetensors.torch.load(data)
        labels, shape = tensors["labels"], tuple(tensors[kind].shape[1:])
        length = int.from_bytes(data[:8], "little")
        about = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][METADATA])
        sums = np.array(about["sums"])
    except (safetensors.SafetensorError, ValueError, KeyError):
        return None
    shard = Shard(shard_name(number), len(labels), len(data), hashlib.sha256(data).hexdigest())
    return Written(shard, labels, shape, about["skipped"], sums, about.get("enlarged", 0))


def channel_sums(tensors: dict[str, Tensor], kind: str) -> np.ndarray:
    """Sums (2, C) of raw latents and of their squares; E[z] = mean and E[z^2] = mean^2 + std^2 for a posterior."""
    total = None
    for name in (kind, f"flipped_{kind}"):
        if name in tensors:
            values = tensors[name].double()
            first, variance = values.chunk(2, dim=1) if kind == "moments" else (values, torch.zeros(()))
            sums = torch.stack([first.sum((0, 2, 3)), (first**2 + variance**2).expand_as(first).sum((0, 2, 3))])
            total = sums if total is None else total + sums
    return total.numpy()
