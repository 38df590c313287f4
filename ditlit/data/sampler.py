"""In which order samples are read: a function of the seed and the step, on any number of ranks."""

from collections.abc import Callable, Iterator
from itertools import islice

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler, Sampler

from ditlit.data.mixture import Mixture
from ditlit.errors import InputError, check_positive, counted


class ShuffleWindows:
    """Confines a shuffle, so that few shards are needed at a time.

    Every epoch permutes the shards and takes them in windows of ``size``; the samples of a window are shuffled
    together. ``encode`` puts images into shards at random, so a window is an unbiased random sample of the data, with
    the default 8 shards of 4,096 samples one of 128 batches of 256. All that differs from an exact shuffle is that
    samples which share a shard are always used within the same window. For stores written in another order, say class
    by class, windows must be large, or the store on a disk.

    Args:
        shard_of: number (n,) of the shard that holds each sample.
        size: shards in a window.
        prefetch: called with the shards of the window that is entered and of the next, in the order of their use.
    """

    def __init__(self, shard_of: Tensor, size: int, prefetch: Callable[[list[int]], None]):
        check_positive(shuffle_window=size)
        self.shards, self.shard_of = shard_of.unique(return_inverse=True)
        self.size = size
        self.prefetch = prefetch

    def draw(self, generator: torch.Generator) -> Tensor:
        """The window (number of shards,) of every shard in an epoch."""
        return torch.randperm(len(self.shards), generator=generator) // self.size

    def sort(self, index: Tensor, window: Tensor) -> Tensor:
        """Samples (m,) window by window, else in the order given."""
        return index[window[self.shard_of[index]].argsort(stable=True)]

    def enter(self, sample: int, entered: int, window: Tensor, next_window: Tensor) -> int:
        """Number of the window of a sample; where it is not the one entered before, prefetches for it.

        ``window`` and ``next_window`` are the draws of this epoch and the next.
        """
        number = int(window[self.shard_of[sample]])
        if number != entered:
            following = window == number + 1 if number < window.max() else next_window == 0
            shards = [*self.shards[window == number].tolist(), *self.shards[following].tolist()]
            self.prefetch(list(dict.fromkeys(shards)))
        return number


class TrainOrder(DistributedSampler):
    """Batches of (index, flip) for one rank, from a fresh permutation of all samples every epoch.

    The permutation is uniform, or confined to :class:`ShuffleWindows`. The global batch of step k is a function of the
    seed and k alone. Each of its ``accumulate`` micro-batches is split evenly over the ranks, so any number of ranks
    sees the same samples in the same step. An epoch is as many whole global batches as there are; the few samples left
    over differ from epoch to epoch.

    A DistributedSampler in name, so that Lightning leaves it as it is.

    Args:
        num_samples: to permute.
        global_batch_size: samples of one optimizer step, over all ranks and micro-batches.
        num_ranks: that share a batch.
        rank: of this process.
        accumulate: micro-batches per optimizer step.
        seed: of the permutations.
        flip: mirror half of the samples.
        next_step: called when iteration starts; says which optimizer step comes next. A resumed run thus continues
            with exactly the samples it had not seen.
        mixture: how often an epoch has which samples; by default each once.
        windows: to shuffle within.

    Raises:
        InputError: where the batch does not divide evenly or exceeds the samples.
    """

    def __init__(
        self,
        num_samples: int,
        global_batch_size: int,
        num_ranks: int,
        rank: int,
        accumulate: int,
        seed: int,
        flip: bool,
        next_step: Callable[[], int],
        mixture: Mixture | None = None,
        windows: ShuffleWindows | None = None,
    ):
        if mixture is not None:
            num_samples = mixture.num_samples
        parts = num_ranks * accumulate
        if global_batch_size % parts:
            raise InputError(
                f"global_batch_size {global_batch_size} does not divide evenly over {counted(num_ranks, 'device')} and "
                f"{counted(accumulate, 'accumulated batch')}; choose a multiple of {parts}"
            )
        if global_batch_size > num_samples:
            raise InputError(
                f"global_batch_size {global_batch_size} exceeds the {counted(num_samples, 'training sample')}; lower it"
            )
        self.num_samples = num_samples
        self.global_batch_size = global_batch_size
        self.batch_size = global_batch_size // parts
        self.num_ranks = num_ranks
        self.rank = rank
        self.accumulate = accumulate
        self.seed = seed
        self.flip = flip
        self.next_step = next_step
        self.mixture = mixture
        self.windows = windows
        self.steps_per_epoch = num_samples // global_batch_size

    def __len__(self) -> int:
        """Batches of one epoch on this rank."""
        return self.steps_per_epoch * self.accumulate

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches from the next step on, without end: the trainer decides where an epoch stops."""
        yield from self.batches(self.next_step())

    def batches(self, first_step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches from a step on, without end."""
        epoch, step = divmod(first_step, self.steps_per_epoch)
        while True:
            index, flip = self.permutation(epoch)
            if self.windows is not None:
                draws, entered = [self.windows.draw(self._generator(e)) for e in (epoch, epoch + 1)], -1
            for k in range(step, self.steps_per_epoch):
                for micro_batch in range(self.accumulate):
                    start = k * self.global_batch_size + (micro_batch * self.num_ranks + self.rank) * self.batch_size
                    rows = slice(start, start + self.batch_size)
                    if self.windows is not None:
                        entered = self.windows.enter(int(index[start]), entered, *draws)
                    yield index[rows], flip[rows]
            epoch, step = epoch + 1, 0

    def permutation(self, epoch: int) -> tuple[Tensor, Tensor]:
        """Index and flip (n,) of every sample in an epoch."""
        generator = self._generator(epoch)
        window = None if self.windows is None else self.windows.draw(generator)
        rows = None if self.mixture is None else self.mixture.draw(generator)
        index = torch.randperm(self.num_samples, generator=generator)
        flip = torch.rand(self.num_samples, generator=generator) < 0.5
        if rows is not None:
            index = rows[index]
        if window is not None:
            index = self.windows.sort(index, window)
        return index, flip if self.flip else torch.zeros_like(flip)

    def _generator(self, epoch: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)

    def set_epoch(self, epoch: int) -> None:
        """Nothing to do: the epoch follows from the step."""


class EpochByEpoch(Sampler):
    """One epoch of a training order after another, each time it is iterated: what a loop without a trainer expects."""

    def __init__(self, order: TrainOrder):
        self.order = order
        self.batch_size = order.batch_size
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.epoch += 1
        return islice(self.order.batches((self.epoch - 1) * self.order.steps_per_epoch), len(self))


class EvalOrder(DistributedSampler):
    """Batches of (index, valid) over all samples once, in order, dealt out to ranks in turn.

    Every rank gets the same number of batches of the same sizes, so that none waits for another: where they do not
    divide evenly the last indices repeat sample 0, marked as not valid.
    """

    def __init__(self, num_samples: int, batch_size: int, num_ranks: int, rank: int):
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.num_ranks = num_ranks
        self.rank = rank
        self.per_rank = -(-num_samples // num_ranks)

    def __len__(self) -> int:
        return -(-self.per_rank // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        index = torch.arange(self.rank, self.per_rank * self.num_ranks, self.num_ranks)
        for part in index.split(self.batch_size):
            valid = part < self.num_samples
            yield torch.where(valid, part, 0), valid

    def set_epoch(self, epoch: int) -> None:
        """Nothing to do: the order is always the same."""
