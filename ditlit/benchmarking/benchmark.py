"""``ditlit benchmark``: the steps of a configuration measured, and what follows from them."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from lightning.pytorch import Trainer
from torch import nn

from ditlit.benchmarking.batch_size import accumulation, largest_batch
from ditlit.benchmarking.ceiling import Products
from ditlit.benchmarking.contenders import DiffusersDiT, DiffusersTraining, check_comparable
from ditlit.benchmarking.plan import Measured, Plan, Reason, plan_rows, row_of, share_of_gpu
from ditlit.benchmarking.report import TRAINING_PASSES, BenchmarkedModel, Ceiling, LargestBatch, Machine, Report, Speed
from ditlit.benchmarking.sampling import measure_sampling, sampling_precision
from ditlit.benchmarking.synthetic import SyntheticLatents
from ditlit.benchmarking.training import (
    MakeTurn,
    Subject,
    TrainingResult,
    Turn,
    gathered_bytes,
    measure_training,
    quiet,
)
from ditlit.callbacks.peaks import product_dtype
from ditlit.checkpoints.contents import variant_name
from ditlit.data.folders import is_remote
from ditlit.data.manifest import MANIFEST
from ditlit.errors import InputError, counted
from ditlit.models import DiT, macs, num_parameters
from ditlit.parallel.fsdp2 import PRECISIONS
from ditlit.resilience.memory import ran_out
from ditlit.settings.benchmark import BenchmarkSettings
from ditlit.training import DiTModule

Build = Callable[[], Subject]
CEILING = "matrix products"
SYNTHETIC = "synthetic"
STEPS = 100_000  # of a run whose configuration gives no number
CHECKPOINTING = "gradient_checkpointing"  # a keyword of denoisers
# Settings of a plan: whether blocks are recomputed, and whether they are compiled.
VARIANTS = {"plain": (False, False), "checkpointing": (True, False), "compile": (False, True)}


class Benchmark:
    """Measures a configuration.

    Args:
        build: makes module, datamodule and the Trainer's settings from the configuration, afresh each time.
        settings: what is measured.
        matmul_precision: of float32 matrix products on GPUs.

    Raises:
        InputError: for settings that do not fit each other or the configuration.
    """

    def __init__(self, build: Build, settings: BenchmarkSettings, matmul_precision: str = "highest"):
        if "TORCHELASTIC_RUN_ID" in os.environ:
            raise InputError("benchmark measures one device, and works the others out: run it without torchrun")
        self.build = build
        self.settings = settings
        self.matmul_precision = matmul_precision
        self.plan = None if settings.plan is None else Plan.parse(settings.plan)
        self.subject = build()
        self.denoiser = self.subject.module.denoiser
        self.accumulate = self.subject.trainer["accumulate_grad_batches"]
        self.global_batch_size = self.subject.datamodule.global_batch_size
        self.gpus = 1 if self.plan is None else self.plan.gpus
        self.share = share_of_gpu(self.global_batch_size, self.gpus, self.accumulate)
        self.micro_batch = self.share // self.accumulate
        self.compare, self.not_compared = compared(settings.compare, self.denoiser)
        with quiet():
            trainer = self.subject.trainer_of()
        self.device, self.precision = trainer.strategy.root_device, str(trainer.precision)
        if settings.find_batch_size and self.device.type != "cuda":
            raise InputError(
                "--find_batch_size needs a CUDA GPU: elsewhere a step that needs too much memory does not fail, but "
                "slows the machine down or ends the process"
            )

    def run(self) -> Report:
        """Measure, one thing after the other."""
        largest = self.find_batch_size() if self.settings.find_batch_size else None
        training, ceiling, data = self.measure_training()
        subject = BenchmarkedModel(
            denoiser_name(self.denoiser), parameters_of(self.denoiser), macs_of(self.denoiser), self.precision,
            self.denoiser.config.get(CHECKPOINTING, False), self.subject.module.compile_blocks, self.global_batch_size,
            self.share, self.accumulate, data,
        )  # fmt: skip
        report = Report(
            Machine.of(self.device), subject, self.settings.warmup, self.settings.repeats, ceiling,
            self.training_speeds(training, ceiling), training.startup,
            None if data.startswith(SYNTHETIC) else training.waited, self.not_compared, largest_batch=largest,
            plan=self.plan,
        )  # fmt: skip
        self.measure_sampling(report)
        if self.plan is not None:
            found = {name: self.variant(name, training) for name in VARIANTS}
            report.plan_rows = plan_rows(self.plan, found, self.gathered())
        elif self.settings.counts:
            steps = self.subject.trainer.get("max_steps", -1)
            report.run_steps = steps if steps > 0 else STEPS
            for gpus in map(int, self.settings.counts):
                plan, found = Plan(report.run_steps, gpus), self.on(gpus, training)
                report.run_rows.append(row_of(plan, counted(gpus, "GPU"), found, "measured"))
        return report

    # Training ----------------------------------------------------------------------------------------------------

    def take_data(self, subject: Subject, share: int | None = None, micro_batch: int | None = None) -> str:
        """Let a subject read the configuration's stores, or synthetic latents where they are not there; says which.

        Args:
            share: samples of a step, by default this device's.
            micro_batch: of them at once.
        """
        data, denoiser = subject.datamodule, subject.module.denoiser
        local = [where for where in (*data.locations, data.val_store) if where is not None and not is_remote(where)]
        missing = next((where for where in local if not (Path(where) / MANIFEST).exists()), None)
        if missing is not None:
            shape = (denoiser.in_channels, *denoiser.input_size)
            subject.datamodule = SyntheticLatents(shape, denoiser.num_classes, micro_batch or self.micro_batch)
            return f"{SYNTHETIC}, since there is no store at {missing}"
        data.global_batch_size = share or self.share
        data.verify = False  # it reads every byte; `fit` does it
        return ", ".join(data.locations)

    def measure_training(self) -> tuple[TrainingResult, Ceiling, str]:
        """Steps, what they are measured against, and what is read; in more parts where they do not fit at once."""
        while True:
            data = self.take_data(self.subject)
            try:
                return *self.measure_steps(), data
            except Exception as error:
                if not ran_out(error) or self.plan is not None or self.micro_batch % 2:
                    with enough_memory(self.micro_batch):
                        raise
            self.accumulate, self.micro_batch = 2 * self.accumulate, self.micro_batch // 2
            self.subject = self.build()
            self.subject.trainer["accumulate_grad_batches"] = self.accumulate

    def measure_steps(self) -> tuple[TrainingResult, Ceiling]:
        say(f"training steps of {counted(self.share, 'sample')}, {self.micro_batch} at once")
        makers: dict[str, MakeTurn] = {}
        products: list[Products] = []
        dtype = product_dtype(self.precision)
        if isinstance(self.denoiser, DiT):

            def make_products(trainer: Trainer, module: DiTModule) -> Turn:
                products.append(Products(module.denoiser, self.micro_batch, dtype, module.device))
                return lambda batches: products[0]()

            makers[CEILING] = make_products
        if self.compare:
            makers[self.compare] = DiffusersTraining
        found = measure_training(self.subject, self.settings.warmup, self.settings.repeats, makers)
        spread = found.turns.get(CEILING)
        measured = products[0].flops / spread.median if products else None
        shape = products[0].shape if products else None
        return found, Ceiling(shape, str(dtype).removeprefix("torch."), spread, measured, found.datasheet)

    def training_speeds(self, found: TrainingResult, ceiling: Ceiling) -> dict[str, Speed]:
        steps = {"ditlit": (found.step, found.peak)}
        if name := self.compare:
            steps[name] = (found.turns[name], found.turn_peaks[name])
        of_step = None if macs_of(self.denoiser) is None else TRAINING_PASSES * macs_of(self.denoiser) * self.share
        return {name: Speed.of(s, self.share / s.median, of_step, ceiling, peak) for name, (s, peak) in steps.items()}

    def on(self, gpus: int, training: TrainingResult) -> Measured | Reason:
        """A step with each GPU's share of the batch: as measured already, measured now, or why it cannot be."""
        if self.global_batch_size % gpus:
            return f"global_batch_size {self.global_batch_size} does not divide evenly"
        share = self.global_batch_size // gpus
        if share == self.share:
            return measured(training)
        accumulate = next(n for n in range(1, share + 1) if share % n == 0 and share // n <= self.micro_batch)
        subject = self.build()
        subject.trainer["accumulate_grad_batches"] = accumulate
        self.take_data(subject, share, share // accumulate)
        say(f"training steps of {counted(share, 'sample')}, the share of each of {counted(gpus, 'GPU')}")
        with enough_memory(share // accumulate):
            return measured(measure_training(subject, self.settings.warmup, self.settings.repeats, {}))

    def variant(self, name: str, training: TrainingResult) -> Measured | Reason:
        """A setting of the plan: as measured already, measured now, or why it cannot be."""
        checkpointing, compile = VARIANTS[name]
        now = self.denoiser.config.get(CHECKPOINTING, False)  # true, false, or a number of blocks
        same = now is True if checkpointing else not now
        if same and self.subject.module.compile_blocks == compile:
            return measured(training)
        if checkpointing and CHECKPOINTING not in self.denoiser.config:
            return f"this denoiser has no {CHECKPOINTING}"
        say(f"training steps for the plan: {name}")
        subject = self.build()
        self.take_data(subject)
        module = subject.module
        module.compile_blocks = compile
        if not same:
            module.denoiser = type(module.denoiser)(**(module.denoiser.config | {CHECKPOINTING: checkpointing}))
        try:
            return measured(measure_training(subject, self.settings.warmup, self.settings.repeats, {}))
        except InputError as error:
            return str(error)
        except Exception as error:
            if not ran_out(error):
                raise
            return "out of memory"

    def gathered(self) -> int | Reason:
        if self.precision not in PRECISIONS:
            return f"fsdp2 does not train with trainer.precision {self.precision}"
        return gathered_bytes(self.denoiser, product_dtype(self.precision))

    def find_batch_size(self) -> LargestBatch:
        say("the largest batch that fits")
        subject = self.build()
        shape = (self.denoiser.in_channels, *self.denoiser.input_size)

        def step(n: int) -> None:
            subject.datamodule = SyntheticLatents(shape, self.denoiser.num_classes, n)
            subject.fit(max_steps=2)  # the second has the optimizer's state from the start

        samples = largest_batch(step)
        parts = accumulation(self.global_batch_size, self.gpus, samples)
        if samples < self.micro_batch:
            remedy = (
                "choose another global_batch_size"
                if parts is None
                else f"set --trainer.accumulate_grad_batches {parts}"
            )
            raise InputError(
                f"{counted(samples, 'sample')} fit at once, but the configuration has {self.micro_batch}: {remedy}"
            )
        return LargestBatch(samples, parts)

    # Sampling ----------------------------------------------------------------------------------------------------

    def measure_sampling(self, report: Report) -> None:
        """Add sampling steps of the averaged weights to the report, where ``ditlit sample`` can draw with them."""
        if not isinstance(self.denoiser, DiT):
            return
        say("sampling steps")
        module = self.subject.module
        fresh = self.build().module.denoiser  # nothing compiled for training
        fresh.load_state_dict(self.denoiser.state_dict())
        denoisers = {"ditlit": fresh}
        if self.compare:
            denoisers[self.compare] = DiffusersDiT(self.denoiser)
        precision = sampling_precision(self.precision, self.matmul_precision)
        with enough_memory(self.micro_batch):
            found = measure_sampling(
                denoisers, module.process, module.sampling, self.micro_batch, self.device, precision,
                self.settings.warmup, self.settings.repeats,
            )  # fmt: skip
        halves = 1 if module.sampling.guidance_scale == 1 else 2
        of_step = halves * macs_of(self.denoiser) * self.micro_batch
        report.sampling = {
            name: Speed.of(one.step, self.micro_batch / one.seconds, of_step, report.ceiling, one.peak)
            for name, one in found.items()
        }
        report.sampler = asdict(module.sampling) | {"batch_size": self.micro_batch, "precision": precision}


@contextmanager
def enough_memory(n: int) -> Iterator[None]:
    """Turn running out of memory with n samples into an error that says what to change."""
    try:
        yield
    except Exception as error:
        if not ran_out(error):
            raise
        raise InputError(
            f"out of memory with {counted(n, 'sample')} at once: raise --trainer.accumulate_grad_batches, set "
            "--model.denoiser.gradient_checkpointing true, or give each GPU less with --plan; --find_batch_size true "
            "finds what fits"
        ) from error


def compared(compare: str, denoiser: nn.Module) -> tuple[str | None, Reason | None]:
    """What to compare with, and why with nothing where that was not to be foreseen."""
    if compare == "none":
        return None, None
    try:
        check_comparable(denoiser)
    except InputError as error:
        if compare != "auto":
            raise
        return None, str(error)
    return "diffusers", None


def measured(found: TrainingResult) -> Measured:
    return Measured(found.step.median, found.startup, found.states, found.peak)


def macs_of(denoiser: nn.Module) -> int | None:
    return macs(denoiser) if isinstance(denoiser, DiT) else None


def parameters_of(denoiser: nn.Module) -> int:
    return num_parameters(denoiser) if isinstance(denoiser, DiT) else sum(p.numel() for p in denoiser.parameters())


def denoiser_name(denoiser: nn.Module) -> str:
    return variant_name(denoiser.config) if isinstance(denoiser, DiT) else type(denoiser).__name__


def say(what: str) -> None:
    print(f"ditlit: measuring {what} ...", file=sys.stderr, flush=True)
