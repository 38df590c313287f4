"""A callback for the tests that kill a run: it writes down every loss, and can send its process a signal."""

import os
import signal
from pathlib import Path

from lightning.pytorch import Callback


class RecordLosses(Callback):
    """Appends "step loss" to a file for each micro-batch.

    After the step ``kill_at``, the process of ``kill_rank``, or each, sends itself a signal.
    """

    def __init__(
        self, folder: str, kill_at: int | None = None, kill_rank: int | None = None, signum: int = int(signal.SIGKILL)
    ):
        self.folder = Path(folder)
        self.kill_at = kill_at
        self.kill_rank = kill_rank
        self.signum = signum

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        with open(self.folder / f"rank{trainer.global_rank}.txt", "a") as file:
            file.write(f"{trainer.global_step} {outputs['terms']['loss'].double().mean().item().hex()}\n")
        if trainer.global_step == self.kill_at and self.kill_rank in (None, trainer.global_rank):
            os.kill(os.getpid(), self.signum)


class RecordSamples(Callback):
    """Appends the samples of each batch, whose latents hold their numbers, to a file."""

    def __init__(self, folder: str):
        self.folder = Path(folder)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        numbers = batch["latents"][:, 0, 0, 0].int().tolist()
        with open(self.folder / f"samples{trainer.global_rank}.txt", "a") as file:
            file.write(" ".join(map(str, numbers)) + "\n")
