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
    for step, t, s in steps(timesteps, process.clean, x):
        prediction = process.predict(model_at(model, timesteps[step].item()), x, t, y)
        x = process.posterior_mean(prediction.x0, x, t, s)
        if step < len(timesteps) - 1:
            std = (process.log_variance(prediction.variance, t, s) / 2).exp()
            x = x + std * randn_like(x, generator)
        if callback:
            callback(step, timesteps[step].item(), x, prediction.x0)
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
    for step, t, s in steps(timesteps, process.clean, x):
        prediction = process.predict(model_at(model, timesteps[step].item()), x, t, y)
        alpha_t, sigma_t = process.scales(t)
        alpha_s, sigma_s = process.scales(s)
        fresh = eta * sigma_s / sigma_t * (1 - (alpha_t / alpha_s) ** 2).sqrt()  # std of the step's noise
        x = alpha_s * prediction.x0 + (sigma_s**2 - fresh**2).sqrt() * prediction.eps
        if eta > 0:
            x = x + fresh * randn_like(x, generator)
        if callback:
            callback(step, timesteps[step].item(), x, prediction.x0)
    return x


@torch.no_grad()
def heun(
    process: Process,
    model: Denoiser,
    noise: Tensor,
    y: Tensor,
    timesteps: Tensor,
    generator: Generators = None,
    callback: StepCallback | None = None,
) -> Tensor:
    """Heun's method on a flow: the mean of the velocities at both ends of a step, two evaluations each.

    Arguments as for :func:`ddpm`. The last step is Euler's where the process does not trust its velocity at clean data.
    """
    x = noise
    ends = [*timesteps[1:].tolist(), process.clean]
    for step, t, s in steps(timesteps, process.clean, x):
        prediction = process.predict(model_at(model, timesteps[step].item()), x, t, y)
        velocity, length = prediction.eps - prediction.x0, (s - t)[:, None, None, None]
        if step < len(timesteps) - 1 or process.velocity_at_clean:
            ahead = process.predict(model_at(model, ends[step]), x + length * velocity, s, y)
            velocity = (velocity + ahead.eps - ahead.x0) / 2
        x = x + length * velocity
        if callback:
            callback(step, timesteps[step].item(), x, prediction.x0)
    return x


LAST_STEP = 0.04  # of the SDE: without noise


@torch.no_grad()
def sde(
    process: Process,
    model: Denoiser,
    noise: Tensor,
    y: Tensor,
    timesteps: Tensor,
    generator: Generators = None,
    callback: StepCallback | None = None,
) -> Tensor:
    """Euler-Maruyama on the SDE of a flow with diffusion coefficient t (Ma et al. 2024, arXiv 2401.08740).

    With v = eps - x0 and the score -eps / t, dx = (v + eps) dt + sqrt(2 t) dw, backwards in time. All steps but the
    last share the time down to 0.04; the last goes from there to clean data without noise. Arguments as for
    :func:`ddpm`.
    """
    x = noise
    timesteps = 1 - (1 - timesteps) * (1 - LAST_STEP) / (1 - timesteps[-1]) if len(timesteps) > 1 else timesteps
    for step, t, s in steps(timesteps, process.clean, x):
        prediction = process.predict(model_at(model, timesteps[step].item()), x, t, y)
        length = (t - s)[:, None, None, None]
        x = x + length * (prediction.x0 - 2 * prediction.eps)
        if step < len(timesteps) - 1:
            x = x + (2 * t[:, None, None, None] * length).sqrt() * randn_like(x, generator)
        if callback:
            callback(step, timesteps[step].item(), x, prediction.x0)
    return x


def model_at(model: Denoiser, t: float) -> Denoiser:
    """The denoiser for a step that all samples take from timestep ``t``: guidance may differ from step to step."""
    return model.at(t) if isinstance(model, ClassifierFreeGuidance) else model


def steps(timesteps: Tensor, clean: float, x: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(number, t, s) of every step, t and s as (N,) on x's device; the last s is the time of clean data."""
    pairs = torch.stack([timesteps, torch.cat([timesteps[1:], timesteps.new_tensor([clean])])])  # (2, num_steps)
    pairs = pairs.to(x.device)[:, :, None].expand(-1, -1, len(x))  # one transfer for the whole loop
    for step in range(len(timesteps)):
        yield step, pairs[0, step], pairs[1, step]
