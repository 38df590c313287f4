"""Drawing samples as :class:`Sampling` says."""

from collections.abc import Sequence
from importlib import import_module

import torch
from torch import Tensor

from ditlit.diffusion.guidance import ClassifierFreeGuidance
from ditlit.diffusion.noise import normal, sample_generators
from ditlit.diffusion.process import Denoiser, Process, StepCallback
from ditlit.errors import InputError
from ditlit.settings.sampling import SAMPLERS, Sampling


def draw_samples(
    sampling: Sampling,
    process: Process,
    model: Denoiser,
    shape: tuple[int, int, int],
    y: Tensor,
    null_label: int,
    indices: Sequence[int],
    seed: int = 0,
    callback: StepCallback | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """Draw the samples with global ``indices`` and labels ``y`` (N,): (N, C, H, W), on y's device.

    All noise of a sample comes from (seed, its index), so it does not depend on batch size, devices or restarts.
    ``noise`` (N, C, H, W) replaces what a sample starts from.
    """
    generators = sample_generators(seed, indices)
    start = normal(shape, generators).to(y.device)
    noise = start if noise is None else noise
    guided = ClassifierFreeGuidance(
        model, sampling.guidance_scale, null_label, sampling.guidance_channels, sampling.guidance_interval
    )  # fmt: skip
    timesteps = process.timesteps(sampling.num_steps, sampling.spacing, sampling.shift)
    sampler = SAMPLERS[sampling.sampler]
    module, _, name = sampler.path.rpartition(".")
    own = {setting: getattr(sampling, setting) for setting in sampler.takes}
    return getattr(import_module(module), name)(process, guided, noise, y, timesteps, generators, callback, **own)


def check_finite(
    x0: Tensor,
    sampling: Sampling,
    process: Process,
    model: Denoiser,
    shape: tuple[int, int, int],
    y: Tensor,
    null_label: int,
    indices: Sequence[int],
    seed: int = 0,
    noise: Tensor | None = None,
) -> None:
    """Raise InputError where not all of ``x0`` (N, C, H, W), drawn with these arguments, is finite.

    It names the first such sample and, by drawing again, the step of which it came. So drawing itself pays nothing.
    """
    bad = ~finite(x0)
    if not bad.any():
        return
    row = int(bad.nonzero()[0])
    steps: list[tuple[int, float]] = []

    def look(step: int, t: float, x: Tensor, _: Tensor) -> None:
        if not finite(x)[row]:
            steps.append((step, t))

    draw_samples(sampling, process, model, shape, y, null_label, indices, seed, look, noise)
    since = f" from step {steps[0][0] + 1} of {sampling.num_steps} (timestep {steps[0][1]:g}) on" if steps else ""
    raise InputError(
        f"image {indices[row]} (class {int(y[row])}) is not finite{since}, one of {int(bad.sum())} such among "
        f"{len(x0)} drawn together; {cause(model)}"
    )


def finite(x: Tensor) -> Tensor:
    """Which samples of x (N, ...) hold finite numbers only: (N,)."""
    return x.isfinite().flatten(1).all(1)


def cause(model: Denoiser) -> str:
    """Why samples are not finite, and the remedy, in words."""
    for name, weight in model.named_parameters() if isinstance(model, torch.nn.Module) else ():
        if not weight.isfinite().all():
            return f"the denoiser's weights {name!r} are not finite: take an earlier checkpoint"
    return (
        "its weights are finite, so numbers overflow on the way: lower the guidance scale, or draw in bf16 or float32"
    )
