"""When a run writes checkpoints: every so many steps, and at its end."""

import os
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from ditlit.errors import check_positive
from ditlit.resilience.checkpoint_files import CheckpointFiles

LAST = "last"


class LastCheckpoint(ModelCheckpoint):
    """Keeps the newest state as ``last.ckpt``: where a fit ends and, if asked, every so many optimizer steps.

    At the end that is the state after the latest whole step, whether max_steps, max_epochs, max_time or a callback has
    ended the fit. A step that is there under this name already is not saved again.

    Args:
        every: optimizer steps; None for the end only.
        dirpath: folder; by default ``checkpoints`` in the run's.
    """

    def __init__(self, every: int | None = None, dirpath: str | None = None):
        check_positive(save_every=every)
        super().__init__(
            dirpath, filename=LAST, every_n_train_steps=every or 0, every_n_epochs=0, enable_version_counter=False
        )
        self._loops: dict[str, Any] | None = None  # of the fit, at the end of the latest whole step
        self._ending = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._loops = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        self._loops = trainer.fit_loop.state_dict()
        if not self._is_saved(trainer):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._loops is None or trainer.fast_dev_run:
            return
        files = trainer.strategy.checkpoint_io
        failed = isinstance(files, CheckpointFiles) and files.error is not None
        if self._is_saved(trainer) and not trainer.strategy.broadcast(failed):
            return
        self._ending = True
        try:
            self.best_model_path = self.format_checkpoint_name({})  # for loggers that upload it
            self._save_checkpoint(trainer, self.best_model_path)
        finally:
            self._ending = False

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._ending:
            # By now Lightning counts the epoch as done, even where it has just begun: a run could not be prolonged.
            checkpoint["loops"]["fit_loop"] = self._loops

    def _is_saved(self, trainer: Trainer) -> bool:
        """Whether this step has been saved under this name, by this callback or another; all ranks must ask."""
        step = trainer.global_step
        saved = [
            callback._last_checkpoint_saved
            for callback in trainer.checkpoint_callbacks
            if isinstance(callback, ModelCheckpoint) and callback._last_global_step_saved == step
        ]
        if not any(saved):
            return False
        here = os.path.realpath(self.format_checkpoint_name({}))  # may be a link to what another callback has written
        return trainer.strategy.broadcast(any(os.path.realpath(path) == here for path in saved if path))

    # Nothing of it is kept, so that a continued run may have another period.

    @property
    def state_key(self) -> str:
        return type(self).__qualname__

    def state_dict(self) -> dict[str, Any]:
        return {}


class KeptCheckpoints(ModelCheckpoint):
    """Keeps a checkpoint of its own every so many optimizer steps, as ``step=00050000.ckpt``.

    Args:
        every: optimizer steps.
    """

    def __init__(self, every: int):
        check_positive(keep_every=every)
        super().__init__(filename="{step:08d}", every_n_train_steps=every, save_top_k=-1)

    @property
    def state_key(self) -> str:
        return type(self).__qualname__

    def state_dict(self) -> dict[str, Any]:
        return {}


def with_checkpoints(
    callbacks: Sequence[Callback] | Callback | None, save_every: int | None, keep_every: int | None
) -> list[Callback]:
    """A run's callbacks, and those that write its checkpoints.

    Where neither a period nor a ModelCheckpoint is given, Lightning's own default is: one checkpoint, of the latest
    epoch or validation.
    """
    callbacks = [callbacks] if isinstance(callbacks, Callback) else list(callbacks or ())
    given = [callback for callback in callbacks if isinstance(callback, ModelCheckpoint)]
    if not given and save_every is None and keep_every is None:
        callbacks.append(ModelCheckpoint())
    if keep_every is not None:
        callbacks.append(KeptCheckpoints(keep_every))
    # The newest state has one place, also where a callback of the user's keeps it elsewhere.
    writes_last = (callback.dirpath for callback in given if callback.save_last or callback.filename == LAST)
    return [*callbacks, LastCheckpoint(save_every, next(writes_last, None))]


def last_checkpoint(trainer: Trainer) -> str:
    """Path or URL of the newest state."""
    writers = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    chosen = [callback for callback in writers if isinstance(callback, LastCheckpoint)] or writers
    folder = chosen[0].dirpath if chosen else None
    return os.path.join(folder or os.path.join(trainer.default_root_dir, "checkpoints"), f"{LAST}.ckpt")
