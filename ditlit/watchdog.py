"""Ranks that watch each other, so that none waits for ever for one that has died."""

import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

INTERVAL = 1.0  # seconds between two signs of life
PATIENCE = 30.0  # without one, until a rank counts as dead
GRACE = 2.0  # for a rank to end by itself, with a message of its own
FAILED = "ditlit/failed"
DONE = b"done"
BROKEN = ("gloo", "NCCL", "ProcessGroup")  # words in the errors of collectives whose other end is gone


class RankWatchdog:
    """Gives signs of life in a store that all ranks reach, and looks for those of the others, in a thread.

    Rank 0 watches all ranks, and they watch it.

    Args:
        store: a connection of its own.
        rank: of this process.
        world_size: number of ranks.
        give_up: called, in the thread, with a sentence on which rank has died.
        interval: seconds between two signs of life.
        patience: seconds without one after which a rank counts as dead.
        grace: seconds for this rank to end by itself before ``give_up`` is called.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        world_size: int,
        give_up: Callable[[str], None],
        interval: float = INTERVAL,
        patience: float = PATIENCE,
        grace: float = GRACE,
    ):
        self.store = store
        self.rank = rank
        self.others = range(1, world_size) if rank == 0 else range(1)
        self.give_up = give_up
        self.interval = interval
        self.patience = patience
        self.grace = grace
        self._ended = threading.Event()
        store.set(key(rank), "0")
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    @classmethod
    def among(
        cls, rank: int, world_size: int, broadcast: Callable[[Any], Any], barrier: Callable[[], Any], advice: str
    ) -> "RankWatchdog":
        """A started watchdog of this process, which ends with one line where another is gone; all ranks must call this.

        The ranks meet at MASTER_ADDR and MASTER_PORT, as with Lightning's launcher, torchrun and SLURM.

        Args:
            broadcast: gives a value of rank 0 to all.
            barrier: waits for all.
            advice: what to do then.
        """

        def give_up(reason: str) -> None:
            print(f"ditlit: rank {rank} stops because {reason}. {advice}", file=sys.stderr, flush=True)
            os._exit(1)  # the main thread may be waiting for the dead rank inside a library

        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=PATIENCE))
        # torchrun keeps the store when it starts ranks again, and with it what those of before have said.
        watchdog = cls(dist.PrefixStore(broadcast(os.urandom(8).hex()), store), rank, world_size, give_up)
        barrier()
        watchdog.start()
        return watchdog

    def start(self) -> None:
        """To be called when every rank has made its watchdog."""
        self._thread.start()

    def fail(self, reason: str) -> None:
        """Tell the others that this rank cannot go on, and leave them the time to hear of it."""
        self._ended.set()
        self._thread.join()
        try:
            self.store.set(FAILED, f"rank {self.rank} failed ({reason})")
            time.sleep(self.grace)  # rank 0 may hold the store
        except dist.DistError:
            pass  # they have found out already

    def fail_with(self, error: BaseException) -> None:
        """Tell the others of an error that ends this rank; where its cause lies with another rank, give up instead."""
        if isinstance(error, RuntimeError) and any(word in str(error) for word in BROKEN):
            self._thread.join(self.patience + 2 * self.grace)  # until it has found out which
        self.fail(f"{type(error).__name__}: {error}".split("\n")[0])

    def end(self) -> None:
        """The work is done; rank 0 waits a while for the others, because their store may end with it."""
        self._ended.set()
        self._thread.join()
        try:
            self.store.set(key(self.rank), DONE.decode())
            deadline = time.monotonic() + self.patience
            while self.rank == 0 and time.monotonic() < deadline:
                if all(self.store.get(key(rank)) == DONE for rank in self.others):
                    return
                time.sleep(0.05)
        except dist.DistError:
            pass  # nobody is left

    def _run(self) -> None:
        beats, seen = 0, {}
        try:
            while not self._ended.wait(self.interval):
                beats += 1
                self.store.set(key(self.rank), str(beats))
                reason = self._look(seen)
                if reason:
                    break
            else:
                return
        except dist.DistError:
            reason = "rank 0 is gone: the store on its machine does not answer"
        if not self._ended.wait(self.grace):
            self.give_up(reason)

    def _look(self, seen: dict[int, tuple[bytes, float]]) -> str | None:
        """Which rank has died, if any; ``seen`` holds the latest sign of life of each and when it was new."""
        if self.store.check([FAILED]):
            return self.store.get(FAILED).decode()
        now = time.monotonic()
        for rank in self.others:
            value = self.store.get(key(rank))
            if rank not in seen or seen[rank][0] != value or value == DONE:
                seen[rank] = (value, now)
            elif now - seen[rank][1] > self.patience:
                reason = f"rank {rank} is gone: no sign of life for {self.patience:.0f} seconds"
                self.store.set(FAILED, reason)
                return reason
        return None


def key(rank: int) -> str:
    return f"ditlit/alive/{rank}"
