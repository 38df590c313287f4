"""Training in which no rank waits for ever for one that has died."""

import os

from lightning.pytorch import Callback, LightningModule, Trainer

from ditlit.pulse import Pulse
from ditlit.resilience.interruption import Interrupted


class Heartbeat(Callback):
    """When a rank dies or fails, the others end within a minute and say which; else they would wait for it for ever."""

    def __init__(self):
        self._pulse: Pulse | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.world_size > 1 and "MASTER_PORT" in os.environ:
            strategy, advice = trainer.strategy, "Continue with --ckpt_path last"
            ranks = trainer.global_rank, trainer.world_size
            self._pulse = Pulse.among(*ranks, strategy.broadcast, strategy.barrier, advice)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._pulse is None:
            return
        if isinstance(exception, Interrupted):
            self._pulse.end()
        else:
            self._pulse.fail_with(exception)
        self._pulse = None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._pulse is not None:
            self._pulse.end()
            self._pulse = None
