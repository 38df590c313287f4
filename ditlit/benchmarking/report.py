"""The report of a benchmark: what was measured, of what, and what follows from it."""

import platform
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ditlit import __version__
from ditlit.benchmarking.gauges import Spread
from ditlit.benchmarking.plan import Plan, Row

TRAINING_PASSES = 3  # forward, and backward for inputs and for weights


@dataclass
class Machine:
    """Hardware and versions."""

    device: str
    cpu_threads: int
    ditlit: str
    torch: str
    cuda: str | None
    lightning: str
    diffusers: str

    @classmethod
    def of(cls, device: torch.device) -> "Machine":
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
        if device.type == "cpu":
            name = f"CPU ({cpu_name()})"
        return cls(
            name, torch.get_num_threads(), __version__, torch.__version__, torch.version.cuda, version("lightning"),
            version("diffusers"),
        )  # fmt: skip


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


@dataclass
class BenchmarkedModel:
    """What was measured.

    Args:
        denoiser: its name.
        parameters: of the denoiser.
        macs: multiply-adds of a forward pass of one sample; None where they are not known.
        precision: of training.
        checkpointing: whether blocks are recomputed in the backward pass, or how many.
        compile: whether blocks are compiled.
        global_batch_size: of the configuration.
        batch_size: samples of an optimizer step on the device.
        accumulate: micro-batches in which they come.
        data: the stores, or "synthetic" where the configuration's are not there.
    """

    denoiser: str
    parameters: int
    macs: int | None
    precision: str
    checkpointing: bool | int
    compile: bool
    global_batch_size: int
    batch_size: int
    accumulate: int
    data: str


@dataclass
class Ceiling:
    """How fast the device could be.

    Args:
        product: sizes of the measured matrix product: rows, width, hidden width.
        dtype: of its numbers.
        seconds: of a measurement.
        measured: FLOP/s of the median; None where the model's largest product is not known.
        datasheet: FLOP/s; None where they are not known.
    """

    product: tuple[int, int, int] | None
    dtype: str
    seconds: Spread | None
    measured: float | None
    datasheet: float | None


@dataclass
class Speed:
    """Steps of one contender.

    Args:
        step: seconds of a step.
        images_per_second: trained, or drawn from noise to the end.
        flops: FLOP/s in the median step, counted by the multiply-adds of our denoiser; None where these are not known.
        of_ceiling: the same as a share of what matrix products of the model's size reach.
        of_datasheet: the same as a share of the device's datasheet.
        peak_memory: bytes; None where unknown.
    """

    step: Spread
    images_per_second: float
    flops: float | None
    of_ceiling: float | None
    of_datasheet: float | None
    peak_memory: int | None

    @classmethod
    def of(cls, step: Spread, images_per_second: float, macs: int | None, ceiling: Ceiling, peak: int | None):
        """With ``macs`` those of the whole step."""
        flops = None if macs is None else 2 * macs / step.median
        shares = (flops / limit if flops and limit else None for limit in (ceiling.measured, ceiling.datasheet))
        return cls(step, images_per_second, flops, *shares, peak)


@dataclass
class LargestBatch:
    """What fits one device.

    Args:
        samples: of a micro-batch.
        accumulate: the fewest accumulated batches by which the global batch fits; None where none does.
    """

    samples: int
    accumulate: int | None


@dataclass
class Report:
    """Everything, as it is written beside the table."""

    machine: Machine
    subject: BenchmarkedModel
    warmup: int
    repeats: int
    ceiling: Ceiling
    training: dict[str, Speed]
    startup_seconds: float
    data_wait_share: float | None
    not_compared: str | None = None  # and why
    sampling: dict[str, Speed] = field(default_factory=dict)
    sampler: dict[str, Any] = field(default_factory=dict)
    largest_batch: LargestBatch | None = None
    plan: Plan | None = None
    plan_rows: list[Row] = field(default_factory=list)
    run_steps: int | None = None
    run_rows: list[Row] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
