"""The training step as ``fit`` runs it, timed from one end of a step to the next."""

import itertools
import logging
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn

from ditlit.benchmarking.gauges import Moment, PeakMemory, Spread, free, mark, seconds_between
from ditlit.benchmarking.plan import States
from ditlit.callbacks.costs import WaitForData
from ditlit.callbacks.peaks import peak_of
from ditlit.resilience.memory import num_bytes
from ditlit.training import DiTModule

# The user's Trainer on one device, without what saves, draws, logs and validates, and without an early end.
ONLY_STEPS = {
    "strategy": "auto",
    "devices": 1,
    "num_nodes": 1,
    "logger": False,
    "callbacks": None,
    "fast_dev_run": False,
    "max_epochs": -1,
    "min_epochs": None,
    "min_steps": None,
    "max_time": None,
    "limit_train_batches": None,
    "limit_val_batches": 0,
    "overfit_batches": 0.0,
    "val_check_interval": None,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 1_000_000,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "profiler": None,
    "barebones": False,
}

Batches = Sequence[dict[str, Tensor]]  # the micro-batches of a step
Turn = Callable[[Batches], None]
MakeTurn = Callable[[Trainer, DiTModule], Turn]


@dataclass
class Subject:
    """What is measured, as the configuration builds it.

    Args:
        module: with its denoiser, loss, optimizer and average.
        datamodule: where its batches come from.
        trainer: settings of the Trainer.
    """

    module: DiTModule
    datamodule: LightningDataModule
    trainer: dict[str, Any]

    def trainer_of(self, **settings: Any) -> Trainer:
        """A Trainer with the user's settings that does nothing but train on one device."""
        return Trainer(**(self.trainer | ONLY_STEPS | settings))

    def fit(self, max_steps: int, **settings: Any) -> None:
        """Train for so many steps with nothing else, and leave no file."""
        with quiet(), tempfile.TemporaryDirectory() as folder:
            trainer = self.trainer_of(max_steps=max_steps, default_root_dir=folder, **settings)
            trainer.fit(self.module, datamodule=self.datamodule)


@contextmanager
def quiet():
    """Without Lightning's remarks on devices, loaders and a fit's end."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            yield
    finally:
        logger.setLevel(level)


@dataclass
class TrainingResult:
    """What was found.

    Args:
        step: optimizer steps.
        startup: seconds that the first step took longer: compiling, choosing kernels, making room.
        waited: share of the steps in which the loop waited for the next batch.
        states: bytes kept between steps.
        peak: the most bytes in use; None where unknown.
        datasheet: FLOP/s of the device at this precision; None where unknown.
        turns: durations of what took turns with the steps.
        turn_peaks: the most bytes that each of these had in use.
    """

    step: Spread
    startup: float
    waited: float
    states: States
    peak: int | None
    datasheet: float | None
    turns: dict[str, Spread] = field(default_factory=dict)
    turn_peaks: dict[str, int | None] = field(default_factory=dict)


class StepTimer(Callback):
    """Times optimizer steps, and lets others take turns with them so that all meet the same machine.

    A step lasts from the end of the one before, so that nothing of the loop is left out. The peak of memory is that of
    the warm-up, before the others are made.

    Args:
        warmup: steps before those that count.
        makers: of what takes turns, by name.
    """

    def __init__(self, warmup: int, makers: Mapping[str, MakeTurn]):
        self.warmup = warmup
        self.makers = makers
        self.wait = WaitForData()
        self._spans: dict[str, list[tuple[Moment, Moment]]] = {"step": []} | {name: [] for name in makers}
        self._turns: dict[str, Turn] = {}
        self._turn_peaks: dict[str, int | None] = {}
        self._batches: list[dict[str, Tensor]] = []
        self._waits: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._device = pl_module.device
        self._memory = PeakMemory(self._device)
        self._memory.start()
        self._datasheet = peak_of(trainer, pl_module)
        self._begin = mark(self._device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._batches.append(batch)
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        steps = self._spans["step"]
        steps.append((self._begin, mark(self._device)))
        self._waits.append(self.wait.seconds)
        if len(steps) == self.warmup:
            self._end_warmup(trainer, pl_module)
        elif len(steps) > self.warmup:
            for name, turn in self._turns.items():
                begin = mark(self._device)
                turn(self._batches)
                self._spans[name].append((begin, mark(self._device)))
        self._batches = []
        self._begin = mark(self._device)

    def _end_warmup(self, trainer: Trainer, pl_module: DiTModule) -> None:
        self._states = states_of(pl_module, trainer.optimizers[0])
        growth = self._memory.growth()
        # Weights and average were there when the growth began.
        self._peak = None if growth is None else growth + self._states.weights + self._states.average
        for name, make in self.makers.items():
            memory = PeakMemory(self._device)
            memory.start()
            self._turns[name] = make(trainer, pl_module)
            for _ in range(self.warmup):
                self._turns[name](self._batches)
            self._turn_peaks[name] = memory.growth()

    def result(self) -> TrainingResult:
        seconds = {name: [seconds_between(*span) for span in spans] for name, spans in self._spans.items()}
        first, timed = seconds["step"][0], seconds["step"][self.warmup :]
        step = Spread.of(timed)
        return TrainingResult(
            step=step,
            startup=max(first - step.median, 0.0),
            waited=(self._waits[-1] - self._waits[self.warmup - 1]) / sum(timed),
            states=self._states,
            peak=self._peak,
            datasheet=self._datasheet,
            turns={name: Spread.of(seconds[name]) for name in self.makers},
            turn_peaks=self._turn_peaks,
        )


def measure_training(subject: Subject, warmup: int, repeats: int, makers: Mapping[str, MakeTurn]) -> TrainingResult:
    """Train for ``warmup`` steps (2 at least), then time ``repeats`` of them."""
    free()  # what an earlier measurement has left
    timer = StepTimer(warmup, makers)
    subject.fit(warmup + repeats, callbacks=[timer], profiler=timer.wait)
    return timer.result()


def states_of(module: DiTModule, optimizer: torch.optim.Optimizer) -> States:
    """Bytes of the weights, of all their gradients, of the optimizer's state, and of the float32 average."""
    parameters = list(module.denoiser.parameters())
    trained = [p for p in parameters if p.requires_grad]
    kept = itertools.chain.from_iterable(state.values() for state in optimizer.state.values())
    return States(
        weights=num_bytes(parameters),
        gradients=num_bytes(trained),
        optimizer=num_bytes(value for value in kept if isinstance(value, Tensor)),
        average=0 if module.ema is None else 4 * sum(p.numel() for p in trained),
    )


def gathered_bytes(denoiser: nn.Module, dtype: torch.dtype) -> int:
    """What FSDP holds of others' shards at a time: weights of this block and the next, and this block's gradients."""
    blocks = getattr(denoiser, "blocks", [denoiser])
    largest = max(sum(p.numel() for p in block.parameters()) for block in blocks)
    return 3 * largest * torch.finfo(dtype).bits // 8
