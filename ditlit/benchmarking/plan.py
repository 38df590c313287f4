"""What a run will take: hours and memory on so many GPUs, from measured steps."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ditlit.errors import InputError

WRITTEN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([km]?)\s*steps?\s*,\s*(\d+)\s*gpus?\s*", re.IGNORECASE)
FACTORS = {"": 1, "k": 1_000, "m": 1_000_000}
SECONDS_AN_HOUR = 3600

Reason = str  # why there is no measurement


@dataclass(frozen=True)
class Plan:
    """A number of optimizer steps on a number of GPUs."""

    steps: int
    gpus: int

    @classmethod
    def parse(cls, text: str) -> "Plan":
        """A plan as it is written: ``400k steps, 8 GPUs``.

        Raises:
            InputError: for anything else.
        """
        found = WRITTEN.fullmatch(text)
        steps = round(float(found[1]) * FACTORS[found[2].lower()]) if found else 0
        if not found or steps < 1 or int(found[3]) < 1:
            raise InputError(f'--plan is written like "400k steps, 8 GPUs" or "7M steps, 64 GPUs", got {text!r}')
        return cls(steps, int(found[3]))


def share_of_gpu(global_batch_size: int, gpus: int, accumulate: int) -> int:
    """Samples of a step on each GPU.

    Raises:
        InputError: where the batch does not divide evenly.
    """
    if global_batch_size % (gpus * accumulate):
        raise InputError(
            f"global_batch_size {global_batch_size} does not divide evenly over {gpus} GPUs and {accumulate} "
            f"accumulated batches; choose a multiple of {gpus * accumulate}"
        )
    return global_batch_size // gpus


@dataclass(frozen=True)
class States:
    """Bytes of what a run keeps between its steps, unsharded: by the number and type of the parameters."""

    weights: int
    gradients: int
    optimizer: int
    average: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.average


@dataclass(frozen=True)
class Measured:
    """A setting's training step on one device.

    Args:
        step: seconds.
        startup: seconds that the first step took longer.
        states: what is kept between steps.
        peak: the most bytes in use, states and what comes and goes in a step; None where unknown.
    """

    step: float
    startup: float
    states: States
    peak: int | None

    @property
    def activations(self) -> int | None:
        """Bytes that come and go in a step."""
        return None if self.peak is None else max(self.peak - self.states.total, 0)


@dataclass(frozen=True)
class Row:
    """One setting of a planned run. Bytes are those of each GPU; ``why`` tells why there are no numbers."""

    setting: str
    step_is: str | None = None
    step: float | None = None
    startup: float | None = None
    hours: float | None = None
    gpu_hours: float | None = None
    states: int | None = None
    activations: int | None = None
    memory: int | None = None
    why: str | None = None


def plan_rows(plan: Plan, measured: Mapping[str, Measured | Reason], gathered: int | Reason) -> list[Row]:
    """A row for each measured setting, and one for FSDP by arithmetic on ``plain``.

    Scaling is taken to be perfect: GPUs do not wait for each other, and the traffic hides behind the products.

    Args:
        measured: by setting, with each GPU's share of the batch; ``plain`` is among them.
        gathered: bytes that FSDP holds of other GPUs' shards at a time, or why it cannot train.
    """
    rows = [row_of(plan, setting, found, "measured") for setting, found in measured.items()]
    plain = measured["plain"]
    if isinstance(gathered, Reason):
        return [*rows, Row("FSDP", why=gathered)]
    if isinstance(plain, Measured):
        shards = States(*(-(-size // plan.gpus) for size in vars(plain.states).values()))
        activations = None if plain.activations is None else plain.activations + gathered
        peak = None if activations is None else shards.total + activations
        sharded = Measured(plain.step, plain.startup, shards, peak)
        return [*rows, row_of(plan, "FSDP", sharded, "as plain")]
    return [*rows, Row("FSDP", why=f"follows from plain: {plain}")]


def row_of(plan: Plan, setting: str, found: Measured | Reason, step_is: str) -> Row:
    if isinstance(found, Reason):
        return Row(setting, why=found)
    hours = plan.steps * found.step / SECONDS_AN_HOUR
    return Row(
        setting, step_is, found.step, found.startup, hours, hours * plan.gpus, found.states.total, found.activations,
        found.peak,
    )  # fmt: skip
