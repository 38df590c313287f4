"""What a denoiser and a diffusion process are to samplers, training and analysis."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

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


class Process(ABC):
    """A diffusion process: what samplers, training and analysis ask of it. One of your own derives from this class.

    Attributes:
        num_timesteps: number T of timesteps, from 0 (almost clean) to T-1 (almost noise).
        config: the keywords that it was built with, from which a checkpoint rebuilds it.
    """

    num_timesteps: int
    config: dict[str, Any]

    def sample_timesteps(self, n: int, generator: torch.Generator | None = None, device=None) -> Tensor:
        """Draw n training timesteps, uniformly."""
        return torch.randint(self.num_timesteps, (n,), generator=generator, device=device)

    @abstractmethod
    def timesteps(self, num_steps: int, spacing: str = "even") -> Tensor:
        """The decreasing timesteps (num_steps,) that a sampler visits."""

    @abstractmethod
    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) of timesteps t (N,), each (N, 1, 1, 1) in float32; t = -1 is clean data: (1, 0)."""

    def noised(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t = alpha_t x0 + sigma_t noise."""
        alpha, sigma = self.scales(t)
        return alpha * x0 + sigma * noise

    @abstractmethod
    def predict(self, model: Denoiser, x_t: Tensor, t: Tensor, y: Tensor) -> Prediction:
        """Ask the denoiser for noise, clean latents and variance at x_t, for sampling."""

    @abstractmethod
    def posterior_mean(self, x0: Tensor, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Mean of q(x_s | x_t, x0) for s < t, which ancestral sampling asks for."""

    @abstractmethod
    def log_variance(self, variance: Tensor | None, t: Tensor, s: Tensor) -> Tensor:
        """Log-variance (N or N, C, H, W) of an ancestral step from t to s, where the denoiser predicts ``variance``."""

    @abstractmethod
    def loss(
        self,
        model: Denoiser,
        x0: Tensor,
        y: Tensor,
        generator: torch.Generator | None = None,
        t: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Per-sample terms (N,) of the training loss, ``loss`` among them; all are logged by their names.

        ``t`` (N,) and ``noise`` (like x0) are drawn from ``generator`` unless given.
        """
