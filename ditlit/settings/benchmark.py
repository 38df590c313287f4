"""Settings of ``benchmark``, beside those of ``fit``."""

from dataclasses import dataclass
from typing import Literal

from ditlit.errors import InputError, check_positive


@dataclass(frozen=True)
class BenchmarkSettings:
    """What is measured of a configuration.

    Args:
        warmup: steps before those that count, 2 at least.
        repeats: steps that count.
        compare: also measure diffusers' DiT of equal depth and width, taking turns with ours; auto where it has one.
        find_batch_size: also find the most samples that fit the GPU at once. The configuration keeps its batch.
        plan: also work out a run such as "400k steps, 8 GPUs": hours, GPU-hours and memory with and without
            checkpointing, compiling and FSDP. Steps are measured with one GPU's share of the batch.
        gpus: without a plan, so many GPUs like this one of which to say what the whole run takes, separated by commas.
            Each share of the batch is measured, in parts where it does not fit at once.
        out: file for the results, by default benchmark.json in trainer.default_root_dir. It is written over.
    """

    warmup: int = 3
    repeats: int = 10
    compare: Literal["auto", "diffusers", "none"] = "auto"
    find_batch_size: bool = False
    plan: str | None = None
    gpus: str = "1,8,64"
    out: str | None = None

    def __post_init__(self):
        if self.warmup < 2:
            raise InputError(f"--warmup is 2 at least, since the first step still makes room, got {self.warmup}")
        check_positive(repeats=self.repeats)
        if not all(word.isdecimal() and int(word) for word in self.counts):
            raise InputError(f"--gpus takes numbers separated by commas, such as 1,8,64, got {self.gpus!r}")

    @property
    def counts(self) -> list[str]:
        return [word.strip() for word in self.gpus.split(",") if word.strip()]
