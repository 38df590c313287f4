"""Stopping a run by a signal: the step is finished, a checkpoint is written, and all ranks stop together."""

import os
import signal
import subprocess
import threading
import time
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from ditlit.resilience.checkpoint_files import CheckpointFiles
from ditlit.resilience.saving import last_checkpoint

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))
SAME_SIGNAL = 1.0  # seconds: launchers pass on a Ctrl-C that the terminal has sent to all processes already


class Interrupted(Exception):
    """A signal has stopped the run, in good order; the message says how to continue."""

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.signum = signum


class StopOnSignal(Callback):
    """On SIGTERM, SIGUSR1 or Ctrl-C: finishes the optimizer step, writes ``last.ckpt`` and raises :class:`Interrupted`.

    It is enough that one process receives the signal. The ranks agree by a number that they reduce on the CPUs, at the
    end of each step and looked at a step later, so that no rank waits for another, or for a GPU. A second Ctrl-C stops
    at once. On SIGUSR1 in a SLURM job, the job is put back into the queue.
    """

    def __init__(self):
        self._received = 0
        self._received_at = 0.0
        self._handlers: dict[int, Any] = {}
        self._group: dist.ProcessGroup | None = None
        self._reduction: tuple[Any, torch.Tensor] | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._received, self._reduction = 0, None
        if trainer.world_size > 1:
            self._group = dist.new_group(backend="gloo")

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._listen(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._listen(trainer)
        # Lightning would have rank 0 tell the others of a SIGTERM before every batch, and wait for the device.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        signum = self._agree() if self._group is not None else self._received
        if signum:
            self._stop(trainer, signum)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore_handlers()
        if self._reduction is not None:
            self._reduction[0].wait()
        if self._group is not None:
            dist.destroy_process_group(self._group)
        self._reduction = self._group = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore_handlers()
        self._reduction = self._group = None  # the other ranks may never come to it

    def _listen(self, trainer: Trainer) -> None:
        if self._handlers or threading.current_thread() is not threading.main_thread():
            return

        def handle(signum: int, frame: Any) -> None:
            now = time.monotonic()
            if not self._received:
                self._received, self._received_at = signum, now
                if trainer.is_global_zero:
                    os.write(2, f"\n{signal.Signals(signum).name}: stopping after this step\n".encode())
            elif signum == signal.SIGINT and now - self._received_at > SAME_SIGNAL:
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                signal.raise_signal(signal.SIGINT)

        self._handlers = {signum: signal.signal(signum, handle) for signum in SIGNALS}

    def _agree(self) -> int:
        """The signal that any rank had received at the end of the step before."""
        signum = 0
        if self._reduction is not None:
            work, value = self._reduction
            work.wait()
            signum = int(value)
        self._reduction = None
        if not signum:
            value = torch.tensor(self._received)
            self._reduction = (dist.all_reduce(value, dist.ReduceOp.MAX, self._group, async_op=True), value)
        return signum

    def _restore_handlers(self) -> None:
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)
        self._handlers = {}

    def _stop(self, trainer: Trainer, signum: int) -> None:
        path = last_checkpoint(trainer)
        trainer.save_checkpoint(path)
        files = trainer.strategy.checkpoint_io
        failed = files.error if isinstance(files, CheckpointFiles) else None
        saved = f"saved {path}" if failed is None else f"could not save {path} ({failed.strerror or failed})"
        message = f"stopped by {signal.Signals(signum).name} after step {trainer.global_step}; {saved}. "
        if signum == getattr(signal, "SIGUSR1", None) and "SLURM_JOB_ID" in os.environ:
            message += requeue() if trainer.is_global_zero else ""
        else:
            message += "Continue with the same command and --ckpt_path last"
        raise Interrupted(message, signum)


def requeue() -> str:
    """Put this SLURM job back into the queue; says how that went."""
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        result = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60)
        problem = result.stderr.strip() or f"exit status {result.returncode}" if result.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    if problem:
        return f"SLURM did not requeue job {job} ({problem}); submit it again with --ckpt_path last"
    return f"SLURM job {job} is back in the queue and continues by itself"
