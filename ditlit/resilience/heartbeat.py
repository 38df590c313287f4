"""Training in which no rank waits for ever for one that has died."""

import os

from lightning.pytorch import Callback, LightningModule, Trainer

from ditlit.resilience.interruption import Interrupted
from ditlit.watchdog import RankWatchdog


class Heartbeat(Callback):
    """When a rank dies or fails, the others end within a minute and say which; else they would wait for it for ever."""

    def __init__(self):
        self._watchdog: RankWatchdog | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.world_size > 1 and "MASTER_PORT" in os.environ:
            strategy, advice = trainer.strategy, "Continue with --ckpt_path last"
            ranks = trainer.global_rank, trainer.world_size
            self._watchdog = RankWatchdog.among(*ranks, strategy.broadcast, strategy.barrier, advice)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._watchdog is None:
            return
        if isinstance(exception, Interrupted):
            self._watchdog.end()
        else:
            self._watchdog.fail_with(exception)
        self._watchdog = None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._watchdog is not None:
            self._watchdog.end()
            self._watchdog = None
