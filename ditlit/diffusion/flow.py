"""Rectified flow: straight ways from noise to data (Liu et al. 2022; Ma et al. 2024, SiT, arXiv 2401.08740)."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ditlit.diffusion.process import Denoiser, Prediction, Process, scheduler_of
from ditlit.errors import InputError, check_positive

NEAREST = 0.05  # to clean data, at which a prediction of clean data still counts as it is in the velocity


class RectifiedFlow(Process):
    """x_t = (1 - t) x0 + t eps with t from 0 (data) to 1 (noise); the denoiser is asked with t and answers the velocity
    v = eps - x0. Released weights that are asked with 1 - t, or answer -v, are changed when they are read.

    Args:
        prediction: what the denoiser answers: the velocity, or clean data (JiT, arXiv 2511.13720), of which the
            velocity is (x_t - x0) / max(t, 0.05), in the loss as in sampling.
        distribution: of training times: uniform, or logit_normal, where t is the sigmoid of a normal number.
        mean: of the normal number.
        std: of the normal number.
        shift: of training times; t becomes shift t / (1 + (shift - 1) t), nearer to noise for more than 1.
        direction_weight: weight in the loss of 1 - cos(v, its target), over channels (Yao et al. 2025,
            arXiv 2501.01423).
        clip_x0: clamp predicted clean data to [-1, 1] in sampling: right for pixels, wrong for VAE latents.
    """

    duration = 1.0
    clean = 0.0
    samplers = ("euler", "heun", "sde", "ddim", "dpm++", "unipc")
    untrained_mse = 2.0

    def __init__(
        self,
        prediction: Literal["velocity", "x0"] = "velocity",
        distribution: Literal["uniform", "logit_normal"] = "uniform",
        mean: float = 0.0,
        std: float = 1.0,
        shift: float = 1.0,
        direction_weight: float = 0.0,
        clip_x0: bool = False,
    ):
        for name, value, known in (
            ("prediction", prediction, ("velocity", "x0")),
            ("distribution", distribution, ("uniform", "logit_normal")),
        ):
            if value not in known:
                raise InputError(f"{name} is one of {', '.join(known)}, got {value!r}")
        for name, value in (("std", std), ("shift", shift)):
            if value <= 0:
                raise InputError(f"{name} must be positive, got {value}")
        if direction_weight < 0:
            raise InputError(f"direction_weight cannot be negative, got {direction_weight}")
        self.config = dict(
            prediction=prediction,
            distribution=distribution,
            mean=mean,
            std=std,
            shift=shift,
            direction_weight=direction_weight,
            clip_x0=clip_x0,
        )
        self.prediction = prediction
        self.distribution = distribution
        self.mean = mean
        self.std = std
        self.shift = shift
        self.direction_weight = direction_weight
        self.clip_x0 = clip_x0
        self.velocity_at_clean = prediction == "velocity"

    # Time --------------------------------------------------------------------------------------------------------

    def sample_timesteps(self, n: int, generator: torch.Generator | None = None, device=None) -> Tensor:
        """Draw n training times in [0, 1], float32."""
        if self.distribution == "uniform":
            t = torch.rand(n, generator=generator, device=device)
        else:
            t = torch.sigmoid(self.mean + self.std * torch.randn(n, generator=generator, device=device))
        return shifted(t, self.shift)

    def timesteps_at(self, fractions: Tensor) -> Tensor:
        return fractions.float()

    def timesteps(self, num_steps: int, spacing: Literal["even"] = "even", shift: float = 1.0) -> Tensor:
        """The decreasing times (num_steps,) from 1 that a sampler visits on its way to 0, in equal steps but for
        ``shift``; float32.
        """
        check_positive(num_steps=num_steps)
        if spacing != "even":
            raise InputError(f"a flow has no timesteps for spacing {spacing!r}; leave it at even")
        return shifted(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)[:-1], shift).float()

    def spans(self, parts: int) -> list[str]:
        return [f"{i / parts:.2f}-{(i + 1) / parts:.2f}" for i in range(parts)]

    def scheduled(self, scheduler: str, num_steps: int, shift: float, **settings: Any) -> tuple[Any, Tensor]:
        """A scheduler of diffusers in its own settings for flows, and its times: from 0.999 on."""
        made = scheduler_of(scheduler, use_flow_sigmas=True, flow_shift=shift, **settings)
        made.set_timesteps(num_steps)
        return made, made.sigmas[:-1].float()

    # Noise -------------------------------------------------------------------------------------------------------

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = t.float()[:, None, None, None]
        return 1 - t, t

    def predict(self, model: Denoiser, x_t: Tensor, t: Tensor, y: Tensor) -> Prediction:
        """Ask the denoiser for clean latents and noise at x_t; there is no variance."""
        velocity = self.velocity(model(x_t, t, y), x_t, t)
        alpha, sigma = self.scales(t)
        x0 = x_t - sigma * velocity
        if self.clip_x0:
            clipped = x0.clamp(-1, 1)
            velocity = velocity + (x0 - clipped) / sigma.clamp(min=NEAREST)
            x0 = clipped
        return Prediction(x0, x_t + alpha * velocity, None)

    def velocity(self, out: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The velocity (N, C, H, W) in a denoiser's answer at x_t, in float32."""
        out = out[:, : x_t.shape[1]].float()
        return out if self.prediction == "velocity" else (x_t - out) / self._divisor(t)

    def _divisor(self, t: Tensor) -> Tensor:
        return t.float().clamp(min=NEAREST)[:, None, None, None]

    # The loss ----------------------------------------------------------------------------------------------------

    def loss(
        self,
        model: Denoiser,
        x0: Tensor,
        y: Tensor,
        generator: torch.Generator | None = None,
        t: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Per-sample terms (N,): ``loss``, ``mse`` of the velocity and, where it has a weight, ``direction``.

        ``t`` (N,) and ``noise`` (like x0) are drawn from ``generator`` unless given.
        """
        if t is None:
            t = self.sample_timesteps(len(x0), generator, x0.device)
        if noise is None:
            noise = torch.randn(x0.shape, generator=generator, device=x0.device, dtype=x0.dtype)
        x_t = self.noised(x0, t, noise)
        target = noise - x0 if self.prediction == "velocity" else (x_t - x0) / self._divisor(t)
        velocity = self.velocity(model(x_t, t, y), x_t, t)
        mse = (velocity - target).square().flatten(1).mean(1)  # (N,)
        if self.direction_weight == 0:
            return {"loss": mse, "mse": mse}
        direction = 1 - F.cosine_similarity(velocity, target, dim=1).flatten(1).mean(1)  # (N,)
        return {"loss": mse + self.direction_weight * direction, "mse": mse, "direction": direction}


def shifted(t: Tensor, shift: float) -> Tensor:
    """shift t / (1 + (shift - 1) t): the ends stay, what is between moves towards 1 for a shift of more than 1."""
    return t if shift == 1 else shift * t / (1 + (shift - 1) * t)
