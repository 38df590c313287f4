"""Ranks that watch each other, so that none waits for ever for one that has died."""

import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from ditlit.training.interruption import Interrupted

INTERVAL = 1.0  # seconds between two signs of life
PATIENCE = 30.0  # without one, until a rank counts as dead
GRACE = 2.0  # for a rank to end by itself, with a message of its own
FAILED = "ditlit/failed"
DONE = b"done"
BROKEN = ("gloo", "NCCL", "ProcessGroup")  # words in the errors of collectives whose other end is gone


class Pulse:
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

    def start(self) -> None:
        """To be called when every rank has made its pulse."""
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

    def wait(self) -> None:
        """Wait for the thread to find out which rank is gone, and to give up."""
        self._thread.join(self.patience + 2 * self.grace)

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


class Heartbeat(Callback):
    """When a rank dies or fails, the others end within a minute and say which; else they would wait for it for ever.

    Works wherever the ranks meet at MASTER_ADDR and MASTER_PORT, as with Lightning's launcher, torchrun and SLURM.
    """

    def __init__(self):
        self._pulse: Pulse | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.world_size == 1 or "MASTER_PORT" not in os.environ:
            return

        def give_up(reason: str) -> None:
            print(
                f"ditlit: rank {trainer.global_rank} stops because {reason}. Continue with --ckpt_path last",
                file=sys.stderr,
                flush=True,
            )
            os._exit(1)  # the main thread may be waiting for the dead rank inside a library

        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=PATIENCE))
        # torchrun keeps the store when it starts ranks again, and with it what those of before have said.
        store = dist.PrefixStore(trainer.strategy.broadcast(os.urandom(8).hex()), store)
        self._pulse = Pulse(store, trainer.global_rank, trainer.world_size, give_up)
        trainer.strategy.barrier("heartbeat")
        self._pulse.start()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._pulse is None:
            return
        if isinstance(exception, Interrupted):
            self._pulse.end()
        else:
            if isinstance(exception, RuntimeError) and any(word in str(exception) for word in BROKEN):
                self._pulse.wait()  # the cause lies with another rank
            self._pulse.fail(f"{type(exception).__name__}: {exception}".split("\n")[0])
        self._pulse = None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._pulse is not None:
            self._pulse.end()
            self._pulse = None
