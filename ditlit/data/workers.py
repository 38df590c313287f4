"""Processes that read ahead, and that cannot be lost unnoticed: a DataLoader for whole batches of tensors.

Its workers differ from those of torch in three ways.

Signals that are sent to all processes of a job, as schedulers and terminals do, reach the workers too; they ignore
them, because the process that they work for decides what becomes of it. They end when it ends them or is gone.

Tensors come through memory that was mapped before the workers started. torch's own way takes a file descriptor for each
tensor and room in /dev/shm; where either runs out, a thread of the worker drops the batch, and the loader waits for it
for ever.

A worker that fails or is killed ends the loop over the batches with one line.
"""

import contextlib
import io
import math
import mmap
import multiprocessing
import os
import pickle
import re
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from ditlit.errors import InputError

SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]
LOOK = 1.0  # seconds between two looks at whether the parent is there
ALIGNMENT = 64  # bytes


class Loader(DataLoader):
    """Batches of a data set, read ahead by worker processes.

    Args:
        dataset: gives the whole batch for each index of the sampler.
        sampler: the indices.
        num_workers: 0 reads between batches.
        batch_bytes: of the tensors of a batch at most; larger ones come more slowly.
        pin_memory: copy batches to memory from which a GPU reads at once.
        prefetch_factor: batches that each worker reads ahead.
        persistent_workers: keep the workers between two loops over the batches.
        shuffle, batch_sampler: Lightning gives them, as nothing, where it makes a loader anew for predictions.
    """

    def __init__(
        self,
        dataset: Dataset,
        sampler: Iterable,
        num_workers: int,
        batch_bytes: int,
        pin_memory: bool = False,
        prefetch_factor: int = 2,
        persistent_workers: bool = False,
        shuffle: bool = False,
        batch_sampler: None = None,
    ):
        self.batch_bytes = batch_bytes
        self.pin = pin_memory
        settings: dict[str, Any] = dict(pin_memory=pin_memory)
        self.slots: Slots | None = None
        if num_workers:
            self.slots = Slots(num_workers, prefetch_factor, batch_bytes)
            settings = dict(
                prefetch_factor=prefetch_factor,
                persistent_workers=persistent_workers,
                collate_fn=self.slots.pack,
                worker_init_fn=serve,
                multiprocessing_context="fork" if self.slots.shared else None,
            )
        super().__init__(dataset, batch_size=None, sampler=sampler, num_workers=num_workers, **settings)

    def __iter__(self) -> Iterator:
        if not self.num_workers:
            return super().__iter__()
        with held():
            batches = super().__iter__()
        return self._received(batches)

    def _received(self, batches: Iterator) -> Iterator:
        try:
            for batch in batches:
                yield self.slots.unpack(batch, self.pin)
        except InputError as error:
            raise InputError(own_words(error)) from error
        except RuntimeError as error:
            if (reason := lost_worker(error)) is None:
                raise
            raise InputError(reason) from error


class Packed(NamedTuple):
    """A batch on its way: the slot that holds its tensors, and all else, pickled."""

    slot: int
    rest: bytes


class Slots:
    """Memory that a process and its workers share. Each worker goes round its own slots: one for each batch that it
    reads ahead, and one that is being read from.
    """

    def __init__(self, num_workers: int, prefetch_factor: int, num_bytes: int):
        self.per_worker = prefetch_factor + 1
        self.shared: list[mmap.mmap] = []
        if sys.platform == "linux":  # elsewhere workers are not forked, and do not inherit it
            with contextlib.suppress(OSError):
                self.shared = [mmap.mmap(-1, num_bytes + 16 * ALIGNMENT) for _ in range(num_workers * self.per_worker)]
        self.packed = 0  # batches of this process

    def pack(self, batch: Any) -> Packed:
        """In a worker: put the tensors of a batch into its next slot."""
        slot = get_worker_info().id * self.per_worker + self.packed % self.per_worker
        self.packed += 1
        rest = io.BytesIO()
        Packer(rest, self.shared[slot] if self.shared else None).dump(batch)
        return Packed(slot, rest.getvalue())

    def unpack(self, batch: Packed, pin_memory: bool) -> Any:
        """The batch, with tensors of its own."""
        return Unpacker(io.BytesIO(batch.rest), self.shared[batch.slot] if self.shared else None, pin_memory).load()


class Packer(pickle.Pickler):
    """Puts tensors into a slot as long as there is room, and pickles everything else."""

    def __init__(self, file: io.BytesIO, slot: mmap.mmap | None):
        super().__init__(file)
        self.slot = slot
        self.end = 0

    def persistent_id(self, value: Any) -> tuple[torch.dtype, torch.Size, int] | None:
        if not isinstance(value, Tensor) or self.slot is None:
            return None
        start = -(-self.end // ALIGNMENT) * ALIGNMENT
        if start + value.nbytes > len(self.slot):
            return None
        self.end = start + value.nbytes
        view_of(self.slot, value.dtype, value.shape, start).copy_(value)
        return value.dtype, value.shape, start


class Unpacker(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, slot: mmap.mmap | None, pin_memory: bool):
        super().__init__(file)
        self.slot = slot
        self.pin_memory = pin_memory

    def persistent_load(self, place: tuple[torch.dtype, torch.Size, int]) -> Tensor:
        tensor = view_of(self.slot, *place)
        return tensor.pin_memory() if self.pin_memory else tensor.clone()


def view_of(slot: mmap.mmap, dtype: torch.dtype, shape: torch.Size, start: int) -> Tensor:
    count = math.prod(shape)
    if not count:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(slot, dtype=dtype, count=count, offset=start).view(shape)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Hold signals back in this thread, and with it in the processes that it forks, until these ignore them."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def serve(worker: int) -> None:
    """In a worker: ignore signals, but for a SIGTERM of the parent, and end with it."""
    if hasattr(signal, "sigtimedwait"):
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    else:
        for signum in SIGNALS:
            signal.signal(signum, signal.SIG_IGN)
    threading.Thread(target=watch, args=(os.getppid(),), name="parent", daemon=True).start()


def watch(parent: int) -> None:
    master = multiprocessing.parent_process().pid  # the same, unless a server forks the workers
    while os.getppid() == parent:
        if not hasattr(signal, "sigtimedwait"):
            time.sleep(LOOK)
            continue
        received = signal.sigtimedwait([signal.SIGTERM], LOOK)
        if received is not None and received.si_pid == master:
            os._exit(0)
    os._exit(1)


def own_words(error: InputError) -> str:
    """What an error says, without the traceback that a process which reads data ahead puts around it."""
    text = str(error)
    return text.rsplit("InputError: ", 1)[-1].strip() if text.startswith("Caught InputError in DataLoader") else text


def lost_worker(error: BaseException) -> str | None:
    """What to tell the user where torch says, in its way, that a worker is gone; None for any other error."""
    if not isinstance(error, RuntimeError) or "DataLoader worker (pid" not in str(error):
        return None
    text = f"{error.__cause__} {error}"  # the cause knows more
    ended = re.search(r"killed by signal: (?!Killed)([\w ]+)|with exit code (\d+)", text)
    if ended is not None:
        return f"a process that reads ahead has crashed ({ended[0].removeprefix('killed by signal: ')})"
    return (
        "a process that reads ahead was killed, most likely because the memory ran out: lower num_workers "
        "(--num_workers, in training --data.num_workers) or the batch size, or give the job more memory"
    )
