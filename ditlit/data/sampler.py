"""In which order samples are read: a function of the seed and the step, on any number of ranks."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

from ditlit.errors import InputError


class TrainOrder(DistributedSampler):
    """Batches of (index, flip) for one rank, from a fresh permutation of all samples every epoch.

    The global batch of step k is a function of the seed and k alone. Each of its ``accumulate`` micro-batches is split
    evenly over the ranks, so any number of ranks sees the same samples in the same step. An epoch is as many whole
    global batches as there are; the few samples left over differ from epoch to epoch.

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
    ):
        parts = num_ranks * accumulate
        if global_batch_size % parts:
            raise InputError(
                f"global_batch_size {global_batch_size} does not divide evenly over {num_ranks} devices and "
                f"{accumulate} accumulated batches; choose a multiple of {parts}"
            )
        if global_batch_size > num_samples:
            raise InputError(
                f"global_batch_size {global_batch_size} exceeds the {num_samples} training samples; lower it"
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
        self.steps_per_epoch = num_samples // global_batch_size

    def __len__(self) -> int:
        """Batches of one epoch on this rank."""
        return self.steps_per_epoch * self.accumulate

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches from the next step on, without end: the trainer decides where an epoch stops."""
        epoch, step = divmod(self.next_step(), self.steps_per_epoch)
        while True:
            index, flip = self.permutation(epoch)
            for k in range(step, self.steps_per_epoch):
                for micro_batch in range(self.accumulate):
                    start = k * self.global_batch_size + (micro_batch * self.num_ranks + self.rank) * self.batch_size
                    rows = slice(start, start + self.batch_size)
                    yield index[rows], flip[rows]
            epoch, step = epoch + 1, 0

    def permutation(self, epoch: int) -> tuple[Tensor, Tensor]:
        """Index and flip (n,) of every sample in an epoch."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        index = torch.randperm(self.num_samples, generator=generator)
        flip = torch.rand(self.num_samples, generator=generator) < 0.5
        return index, flip if self.flip else torch.zeros_like(flip)

    def set_epoch(self, epoch: int) -> None:
        """Nothing to do: the epoch follows from the step."""


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
