"""A sampling step as ``sample`` runs it: the denoiser, guided, and the sampler's update."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ditlit.benchmarking.gauges import Moment, PeakMemory, Spread, free, mark, seconds_between
from ditlit.diffusion import Process, Sampling, draw_samples
from ditlit.generation.pipeline import WEIGHTS, Precision, SamplingPipeline, matmul_precision
from ditlit.resilience.memory import num_bytes


@dataclass
class SamplingResult:
    """What was found for one denoiser.

    Args:
        step: a guided step of the sampler.
        unguided: a step outside of the guidance interval, where there is one.
        seconds: of all steps of a batch.
        peak: the most bytes in use; None where unknown.
    """

    step: Spread
    unguided: Spread | None
    seconds: float
    peak: int | None


class Enough(Exception):
    """Ends a draw of which only the first steps are wanted."""


def measure_sampling(
    denoisers: Mapping[str, nn.Module],
    process: Process,
    sampling: Sampling,
    n: int,
    device: torch.device,
    precision: Precision,
    warmup: int,
    repeats: int,
) -> dict[str, SamplingResult]:
    """Time steps of a batch of n samples. The denoisers take turns; ours is the first, in a
    :class:`SamplingPipeline`.

    Steps are timed one by one, since a whole draw of 250 takes long; all guided ones cost the same.
    """
    free()  # what training has left
    drawn_by: dict[str, nn.Module] = {}
    peaks: dict[str, int | None] = {}
    memory = PeakMemory(device)
    for i, (name, denoiser) in enumerate(denoisers.items()):
        drawn_by[name] = prepared(denoiser, process, sampling, device, precision, ours=i == 0)
        memory.start()
        for _ in range(warmup):
            step_seconds(drawn_by[name], process, guided_only(sampling), n, device, precision)
        growth = memory.growth()
        peaks[name] = None if growth is None else growth + num_bytes(drawn_by[name].parameters())
    kinds = {"step": guided_only(sampling)}
    if sampling.guidance_interval is not None:
        kinds["unguided"] = replace(kinds["step"], guidance_scale=1.0)
    values: dict[tuple[str, str], list[float]] = {(name, kind): [] for name in denoisers for kind in kinds}
    for _ in range(repeats):
        for name, kind in values:
            values[name, kind].append(step_seconds(drawn_by[name], process, kinds[kind], n, device, precision))
    results = {}
    for name in denoisers:
        spreads = {kind: Spread.of(values[name, kind]) for kind in kinds}
        num_guided, num_unguided = count_guided(process, sampling)
        seconds = num_guided * spreads["step"].median
        if num_unguided:
            seconds += num_unguided * spreads["unguided"].median
        results[name] = SamplingResult(spreads["step"], spreads.get("unguided"), seconds, peaks[name])
    return results


def prepared(
    denoiser: nn.Module,
    process: Process,
    sampling: Sampling,
    device: torch.device,
    precision: Precision,
    ours: bool,
) -> nn.Module:
    """A denoiser on the device, in the precision of sampling, ours with what :class:`SamplingPipeline` makes of it."""
    denoiser.eval()
    if not ours:
        return denoiser.to(device, WEIGHTS[precision])
    latents: dict[str, Any] = {"shift": [0.0], "scale": [1.0]}
    return SamplingPipeline(denoiser, process, latents, sampling, 0, device, precision).denoiser


def guided_only(sampling: Sampling) -> Sampling:
    """Three guided steps of a sampler, whatever its spacing and interval."""
    return replace(sampling, num_steps=3, spacing="even", guidance_interval=None)


def count_guided(process: Process, sampling: Sampling) -> tuple[int, int]:
    """How many steps are inside and outside of the guidance interval."""
    timesteps = process.timesteps(sampling.num_steps, sampling.spacing, sampling.shift).tolist()
    low, high = sampling.guidance_interval or (min(timesteps), max(timesteps))
    inside = sum(low <= t <= high for t in timesteps)
    return inside, len(timesteps) - inside


def step_seconds(
    denoiser: nn.Module,
    process: Process,
    sampling: Sampling,
    n: int,
    device: torch.device,
    precision: Precision,
) -> float:
    """Seconds of the second step of a draw of n samples: the first is late, the last may be simpler."""
    moments: list[Moment] = []

    def callback(step: int, *_: Any) -> None:
        moments.append(mark(device))
        if step == 1:
            raise Enough

    y = torch.arange(n, device=device) % denoiser.num_classes
    shape = (denoiser.in_channels, *denoiser.input_size)
    with matmul_precision(precision), torch.inference_mode(), suppress(Enough):
        draw_samples(sampling, process, denoiser, shape, y, denoiser.num_classes, range(n), 0, callback)
    return seconds_between(*moments)


def sampling_precision(training: str, matmul: str) -> Precision:
    """The precision of ``sample`` that is nearest to a trainer's, with its float32 products as they are set."""
    if "bf16" in training:
        return "bf16"
    if training.startswith("16"):
        return "fp16"
    return "32" if matmul == "highest" else "tf32"
