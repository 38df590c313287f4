"""TensorBoard curves that may fail without ending the run that they show."""

import threading
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn


class RunLogger(TensorBoardLogger):
    """A TensorBoardLogger that, where its file cannot be written any more, says so once and lets training go on."""

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        writer = super().experiment
        file = writer.file_writer
        if file is not None and not isinstance(file.event_writer, Events):
            file.event_writer = Events(file.event_writer)
            threading.excepthook = report_thread
        return writer

    def save(self) -> None:
        """Nothing before the first curve, so that a run that is refused leaves no file."""
        if self._experiment is not None:
            super().save()


def report_thread(args: threading.ExceptHookArgs) -> None:
    """Errors of threads as ever, but for those of TensorBoard's writer, which :class:`Events` puts in one line."""
    if not type(args.thread).__module__.startswith("tensorboard."):
        threading.__excepthook__(args)


class Events:
    """TensorBoard's event file, up to the first error."""

    def __init__(self, writer: Any):
        self.writer = writer
        self.failed = False

    def add_event(self, event: Any) -> None:
        self._attempt(self.writer.add_event, event)

    def flush(self) -> None:
        self._attempt(self.writer.flush)

    def close(self) -> None:
        self._attempt(self.writer.close)

    def _attempt(self, method: Any, *args: Any) -> None:
        if self.failed:
            return
        try:
            method(*args)
        except OSError as error:
            self.failed = True
            rank_zero_warn(
                f"the TensorBoard curves in {self.writer.get_logdir()} cannot be written ({error.strerror or error}): "
                "they end here, and training goes on"
            )

    def __getattr__(self, name: str) -> Any:
        return getattr(self.writer, name)
