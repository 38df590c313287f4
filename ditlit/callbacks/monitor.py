"""What a run shows while it trains: curves in the logger and a progress bar."""

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from torch import Tensor

from ditlit.callbacks.costs import WaitForData, memory_in_use
from ditlit.callbacks.overview import write_overview
from ditlit.callbacks.peaks import peak_of
from ditlit.models import DiT, macs

QUARTILES = 4


class TrainingMonitor(Callback):
    """Logs, every ``trainer.log_every_n_steps`` steps, means over the steps since: loss and its terms, loss by quartile
    of the timestep, images per second and images seen, seconds a step and those of them spent waiting for data, TFLOP/s
    of each device and, where it is known, their share of its peak (MFU); and the latest gradient norm, learning rate,
    decay and relative distance of the moving average, and memory of the first process in GB: the most that tensors have
    taken of its GPU so far, or on a CPU what the process takes.

    Loggers also get the run's settings, and those that take texts its model and store; TensorBoard a layout of the
    curves.

    Values are added up on the device and read once a log entry, so that a step waits for nothing.
    """

    def __init__(self):
        self._sums: Tensor | None = None
        self._wait: WaitForData | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._peak = peak_of(trainer, pl_module)
        self._flops = 6 * macs(pl_module.denoiser) if isinstance(pl_module.denoiser, DiT) else None
        if trainer.is_global_zero:
            write_overview(trainer, pl_module)
        self._wait = trainer.profiler = WaitForData(trainer.profiler)
        self._start_window()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._give_back_profiler(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._give_back_profiler(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: dict[str, Any], batch: Any, batch_idx: int
    ) -> None:
        self._add(outputs, pl_module.process.duration)
        self._batch = len(outputs["t"]) * trainer.world_size
        self._images += self._batch
        at_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        self._steps += at_step
        if at_step and trainer.global_step % trainer.log_every_n_steps == 0:
            self._log(trainer, pl_module)
            self._start_window()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._paused_at = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._started += time.perf_counter() - self._paused_at  # throughput is that of training

    def _give_back_profiler(self, trainer: Trainer) -> None:
        if trainer.profiler is self._wait:  # not before the first step
            trainer.profiler = self._wait.profiler

    def _start_window(self) -> None:
        self._sums = None
        self._images = self._steps = 0
        self._waited = self._wait.seconds
        self._started = time.perf_counter()

    def _add(self, outputs: dict[str, Any], duration: float) -> None:
        terms = outputs["terms"]
        self._names = list(terms)
        quartile = outputs["t"] * QUARTILES // duration  # (N,)
        in_quartile = quartile[:, None] == torch.arange(QUARTILES, device=quartile.device)  # (N, 4)
        in_quartile = in_quartile.to(terms["loss"])
        values = torch.stack(list(terms.values()))  # (terms, N)
        sums = torch.cat([values.sum(1), terms["loss"] @ in_quartile, in_quartile.sum(0)])
        self._sums = sums if self._sums is None else self._sums + sums

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        sums = trainer.strategy.reduce(self._sums, reduce_op="sum")
        norm = pl_module.grad_norm if pl_module.grad_norm is not None else sums.new_tensor(float("nan"))
        distance = norm if pl_module.ema is None else pl_module.ema.distance(pl_module)
        # The only wait for the device.
        *sums, norm, distance = torch.cat([sums, torch.stack([norm, distance]).to(sums)]).tolist()
        elapsed = time.perf_counter() - self._started
        *sums, q1, q2, q3, q4, n1, n2, n3, n4 = sums
        metrics = {f"train/{name}": total / self._images for name, total in zip(self._names, sums, strict=True)}
        quartiles = zip((q1, q2, q3, q4), (n1, n2, n3, n4), pl_module.process.spans(QUARTILES), strict=True)
        metrics |= {f"loss_by_timestep/{span}": total / n for total, n, span in quartiles if n}
        rate = self._images / elapsed
        metrics |= {
            "train/grad_norm": norm,
            "train/learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
            "throughput/images_per_second": rate,
            "throughput/images_seen": trainer.global_step * self._batch * trainer.accumulate_grad_batches,
            "throughput/step_seconds": elapsed / self._steps,
            "throughput/data_wait": (self._wait.seconds - self._waited) / self._steps,
        }
        if pl_module.ema is not None:
            metrics |= {"train/ema_distance": distance, "train/ema_decay": pl_module.ema.decay_in_force}
        if (memory := memory_in_use(pl_module.device)) is not None:
            metrics["throughput/memory_gb"] = memory / 1e9
        shown = {"loss": metrics["train/loss"], "img/s": rate}
        if self._flops:
            achieved = rate * self._flops / trainer.world_size  # of each device
            metrics["throughput/tflops"] = achieved / 1e12
            if self._peak:
                metrics["throughput/mfu"] = shown["MFU"] = achieved / self._peak
            else:
                shown["TFLOP/s"] = metrics["throughput/tflops"]
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
        pl_module.log_dict(shown, prog_bar=True, logger=False)


class RunProgressBar(TQDMProgressBar):
    """One bar for the whole run in optimizer steps, instead of one an epoch: rate, time left and the latest loss.

    Args:
        refresh_rate: batches between two updates.
    """

    def __init__(self, refresh_rate: int = 10):
        super().__init__(refresh_rate=refresh_rate)

    def init_train_tqdm(self):
        bar = super().init_train_tqdm()
        bar.total = None if self.trainer.max_steps < 0 else self.trainer.max_steps
        bar.initial = bar.n = self.trainer.global_step
        bar.unit = "step"
        return bar

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.train_progress_bar.total is None and trainer.max_epochs not in (None, -1):
            batches = trainer.num_training_batches * trainer.max_epochs
            self.train_progress_bar.total = batches // trainer.accumulate_grad_batches
        self.train_progress_bar.set_description(f"Training, epoch {trainer.current_epoch}")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        bar = self.train_progress_bar
        if self._should_update(trainer.global_step, bar.total) and not bar.disable:
            bar.n = trainer.global_step
            bar.set_postfix(self.get_metrics(trainer, pl_module))

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in metrics.items()}
