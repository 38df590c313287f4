"""What a denoiser and a diffusion process are to samplers, training and analysis."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

# One generator for the whole batch, or one for each sample: then a sample does not depend on its batch.
Generators = torch.Generator | Sequence[torch.Generator] | None
# Called after every step with its number from 0, the timestep it left, x_s and the predicted x0.
StepCallback = Callable[[int, int, Tensor, Tensor], None]


class Denoiser(Protocol):
    """Anything that maps x_t (N, C, H, W), t (N,), y (N,) to (N, C or 2C, H, W): noise first, then the variance."""

    def __call__(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor: ...


class Prediction(NamedTuple):
    """What a denoiser says about x_t: clean latents, noise, and its raw variance output if it has one."""

    x0: Tensor
    eps: Tensor
    variance: Tensor | None


class Process(Protocol):
    """What the samplers ask of a diffusion process."""

    def timesteps(self, num_steps: int, spacing: str = "even") -> Tensor: ...
    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]: ...
    def predict(self, model: Denoiser, x_t: Tensor, t: Tensor, y: Tensor) -> Prediction: ...
    def posterior_mean(self, x0: Tensor, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor: ...
    def log_variance(self, variance: Tensor | None, t: Tensor, s: Tensor) -> Tensor: ...
