"""The way from noise to a picture, as pictures."""

from typing import NamedTuple

import torch
from torch import Tensor

from ditlit.diffusion.noise import normal, sample_generators
from ditlit.errors import InputError
from ditlit.generation.pipeline import SamplingPipeline


class Snapshots(NamedTuple):
    """Snapshots along the way.

    Attributes:
        timesteps: timestep that each snapshot's step left, (S,), decreasing.
        noisy: what the sampler holds before these steps, bytes (S, N, C, H, W).
        clean: what the denoiser then takes the clean picture to be, bytes (S, N, C, H, W).
    """

    timesteps: list[float]
    noisy: Tensor
    clean: Tensor


def snapshots(pipeline: SamplingPipeline, y: Tensor, columns: int) -> Snapshots:
    """Draw samples 0 to N-1 with labels y (N,) and keep so many snapshots, evenly spread over the steps.

    Raises:
        InputError: for fewer than two snapshots, or more than there are steps.
    """
    steps = pipeline.sampling.num_steps
    if not 2 <= columns <= steps:
        raise InputError(f"columns must lie between 2 and the number of steps, {steps}; got {columns}")
    wanted = {round(i * (steps - 1) / (columns - 1)) for i in range(columns)}
    indices = range(len(y))
    noise = normal(pipeline.shape, sample_generators(pipeline.seed, indices))
    x_t = noise.to(pipeline.device)  # what sampling starts from
    timesteps, noisy, clean = [], [], []

    def see(step: int, t: int, x: Tensor, x0: Tensor) -> None:
        nonlocal x_t
        if step in wanted:
            timesteps.append(t)
            noisy.append(pipeline.images(pipeline.raw(x_t)))
            clean.append(pipeline.images(pipeline.raw(x0)))
        x_t = x

    pipeline.draw(indices, y, callback=see)
    return Snapshots(timesteps, torch.stack(noisy), torch.stack(clean))
