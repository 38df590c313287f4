"""A callback for the tests that kill a run: it writes down every loss, and can end the process without a goodbye."""

import os
import signal
from pathlib import Path

from lightning.pytorch import Callback


class RecordLosses(Callback):
    """Appends "step loss" to a file for each micro-batch, and kills its own process after the step ``kill_at``."""

    def __init__(self, folder: str, kill_at: int | None = None):
        self.folder = Path(folder)
        self.kill_at = kill_at

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        with open(self.folder / f"rank{trainer.global_rank}.txt", "a") as file:
            file.write(f"{trainer.global_step} {outputs['terms']['loss'].double().mean().item().hex()}\n")
        if trainer.global_step == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


class RecordSamples(Callback):
    """Appends the samples of each batch, whose latents hold their numbers, to a file."""

    def __init__(self, folder: str):
        self.folder = Path(folder)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        numbers = batch["latents"][:, 0, 0, 0].int().tolist()
        with open(self.folder / f"samples{trainer.global_rank}.txt", "a") as file:
            file.write(" ".join(map(str, numbers)) + "\n")
