"""What a denoiser and a diffusion process are to samplers, training and analysis."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ditlit.errors import InputError

# One generator for the whole batch, or one for each sample: then a sample does not depend on its batch.
Generators = torch.Generator | Sequence[torch.Generator] | None
# Called after every step with its number from 0, the timestep it left, x_s and the predicted x0.
StepCallback = Callable[[int, float, Tensor, Tensor], None]


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

    Time runs from little noise to nothing but noise, in numbers that the denoiser is asked with.

    Attributes:
        config: the keywords that it was built with, from which a checkpoint rebuilds it.
        duration: the end of time: the number T of timesteps 0 to T-1, or 1 where time is continuous.
        clean: the time of clean data, at which sampling ends.
        samplers: names of the samplers that can walk it.
        velocity_at_clean: whether the denoiser's velocity can be trusted there.
        untrained_mse: of a denoiser that answers zero, where data have unit variance.
    """

    config: dict[str, Any]
    duration: float
    clean: float
    samplers: tuple[str, ...]
    velocity_at_clean: bool = True
    untrained_mse: float = 1.0

    # Time --------------------------------------------------------------------------------------------------------

    @abstractmethod
    def sample_timesteps(self, n: int, generator: torch.Generator | None = None, device=None) -> Tensor:
        """Draw n training timesteps (n,)."""

    @abstractmethod
    def timesteps_at(self, fractions: Tensor) -> Tensor:
        """The timesteps (N,) at these fractions (N,) of the duration, each in [0, 1)."""

    @abstractmethod
    def timesteps(self, num_steps: int, spacing: str = "even", shift: float = 1.0) -> Tensor:
        """The decreasing timesteps (num_steps,) that a sampler visits.

        Raises:
            InputError: for a number, spacing or shift that the process cannot take.
        """

    @abstractmethod
    def spans(self, parts: int) -> list[str]:
        """Names of equal parts of the duration, for curves."""

    def scheduled(self, scheduler: str, num_steps: int, shift: float, **settings: Any) -> tuple[Any, Tensor]:
        """A scheduler of diffusers by the name of its class, and the timesteps (num_steps,) that it visits.

        Raises:
            InputError: where it has none for such a process.
        """
        raise InputError(f"{scheduler} of diffusers does not know the process {type(self).__name__}")

    # Noise -------------------------------------------------------------------------------------------------------

    @abstractmethod
    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) of timesteps t (N,), each (N, 1, 1, 1) in float32; (1, 0) at the time of clean data."""

    def noised(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t = alpha_t x0 + sigma_t noise."""
        alpha, sigma = self.scales(t)
        return alpha * x0 + sigma * noise

    @abstractmethod
    def predict(self, model: Denoiser, x_t: Tensor, t: Tensor, y: Tensor) -> Prediction:
        """Ask the denoiser for noise, clean latents and variance at x_t, for sampling."""

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


def scheduler_of(name: str, **settings: Any) -> Any:
    """A scheduler of diffusers that is told clean data: every process has these."""
    import diffusers  # slow to import, and only needed for its samplers

    return getattr(diffusers, name)(prediction_type="sample", **settings)
