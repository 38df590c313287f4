"""Samplers: each a free function that walks a process's timesteps from noise to data."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ditlit.diffusion.guidance import ClassifierFreeGuidance
from ditlit.diffusion.noise import randn_like
from ditlit.diffusion.process import Denoiser, Generators, Process, StepCallback


@torch.no_grad()
def ddpm(
    process: Process,
    model: Denoiser,
    noise: Tensor,
    y: Tensor,
    timesteps: Tensor,
    generator: Generators = None,
    callback: StepCallback | None = None,
) -> Tensor:
    """Ancestral sampling (Ho et al. 2020, algorithm 2) over any decreasing ``timesteps``.

    Args:
        noise: x at the first timestep, (N, C, H, W).
        y: labels (N,).
        timesteps: decreasing, from ``process.timesteps``.
        generator: source of the noise of each step.
        callback: called after every step.

    Returns:
        Clean latents (N, C, H, W).
    """
    x = noise
    for step, t, s in steps(timesteps, x):
        prediction = process.predict(model_at(model, timesteps[step]), x, t, y)
        x = process.posterior_mean(prediction.x0, x, t, s)
        if step < len(timesteps) - 1:
            std = (process.log_variance(prediction.variance, t, s) / 2).exp()
            x = x + std * randn_like(x, generator)
        if callback:
            callback(step, int(timesteps[step]), x, prediction.x0)
    return x


@torch.no_grad()
def ddim(
    process: Process,
    model: Denoiser,
    noise: Tensor,
    y: Tensor,
    timesteps: Tensor,
    generator: Generators = None,
    callback: StepCallback | None = None,
    eta: float = 0.0,
) -> Tensor:
    """DDIM (Song et al. 2020, arXiv 2010.02502, equations 12 and 16): deterministic at ``eta`` 0, ancestral noise at 1.

    Arguments as for :func:`ddpm`.
    """
    x = noise
    for step, t, s in steps(timesteps, x):
        prediction = process.predict(model_at(model, timesteps[step]), x, t, y)
        alpha_t, sigma_t = process.scales(t)
        alpha_s, sigma_s = process.scales(s)
        fresh = eta * sigma_s / sigma_t * (1 - (alpha_t / alpha_s) ** 2).sqrt()  # std of the step's noise
        x = alpha_s * prediction.x0 + (sigma_s**2 - fresh**2).sqrt() * prediction.eps
        if eta > 0:
            x = x + fresh * randn_like(x, generator)
        if callback:
            callback(step, int(timesteps[step]), x, prediction.x0)
    return x


def model_at(model: Denoiser, t: Tensor | int) -> Denoiser:
    """The denoiser for a step that all samples take from timestep ``t``: guidance may differ from step to step."""
    return model.at(int(t)) if isinstance(model, ClassifierFreeGuidance) else model


def steps(timesteps: Tensor, x: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(number, t, s) of every step, t and s as (N,) on x's device; the last s is -1, clean data."""
    pairs = torch.stack([timesteps, torch.cat([timesteps[1:], timesteps.new_tensor([-1])])])  # (2, num_steps)
    pairs = pairs.to(x.device)[:, :, None].expand(-1, -1, len(x))  # one transfer for the whole loop
    for step in range(len(timesteps)):
        yield step, pairs[0, step], pairs[1, step]
