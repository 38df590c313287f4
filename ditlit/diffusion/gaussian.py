"""Gaussian diffusion in discrete time: schedule, loss, and the posterior between any two timesteps.

Notation: x_t = alpha_t x0 + sigma_t eps, with alpha_t^2 = cumprod_t = prod(1 - beta) and sigma_t^2 = 1 - cumprod_t
(Ho et al. 2020, arXiv 2006.11239). Learned variances and the hybrid loss are those of Nichol & Dhariwal 2021
(arXiv 2102.09672).
"""

import math
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ditlit.diffusion.process import Denoiser, Prediction, Process, scheduler_of
from ditlit.errors import InputError


def linear_betas(num_timesteps: int) -> Tensor:
    """Ho et al. 2020, section 4: 1e-4 to 2e-2 over 1,000 steps, scaled to keep the same total noise for another T."""
    scale = 1000 / num_timesteps
    return torch.linspace(scale * 1e-4, scale * 2e-2, num_timesteps, dtype=torch.float64)


def cosine_betas(num_timesteps: int) -> Tensor:
    """Nichol & Dhariwal 2021, equation 17: alphas_cumprod follows a squared cosine; betas are capped at 0.999."""
    u = torch.linspace(0, 1, num_timesteps + 1, dtype=torch.float64)
    alphas_cumprod = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(max=0.999)


SCHEDULES = {"linear": linear_betas, "cosine": cosine_betas}


class GaussianDiffusion(Process):
    """The diffusion process of DiT: noise prediction with T discrete timesteps.

    Args:
        num_timesteps: number T of timesteps; t runs from 0 (almost clean) to T-1 (almost noise).
        schedule: linear betas (the paper) or a squared-cosine alphas_cumprod.
        vlb_weight: weight of the variational bound in the loss; 0 trains on the squared error alone. It applies to
            denoisers that predict their variance.
        fixed_variance: variance of a sampling step where the denoiser does not predict it: beta (large) or that of the
            posterior given x0 (small).
        clip_x0: clamp predicted clean data to [-1, 1] in sampling: right for pixels, wrong for VAE latents, which
            exceed it.
    """

    clean = -1
    samplers = ("ddpm", "ddim", "dpm++", "unipc", "deis")

    def __init__(
        self,
        num_timesteps: int = 1000,
        schedule: Literal["linear", "cosine"] = "linear",
        vlb_weight: float = 1.0,
        fixed_variance: Literal["large", "small"] = "large",
        clip_x0: bool = False,
    ):
        if schedule not in SCHEDULES:
            raise InputError(f"unknown schedule {schedule!r}; choose one of {', '.join(SCHEDULES)}")
        if num_timesteps < 21:
            raise InputError(f"num_timesteps must be more than 20, got {num_timesteps}")
        self.config = dict(
            num_timesteps=num_timesteps,
            schedule=schedule,
            vlb_weight=vlb_weight,
            fixed_variance=fixed_variance,
            clip_x0=clip_x0,
        )
        self.num_timesteps = self.duration = num_timesteps
        self.vlb_weight = vlb_weight
        self.fixed_variance = fixed_variance
        self.clip_x0 = clip_x0
        self.alphas_cumprod = (1 - SCHEDULES[schedule](num_timesteps)).cumprod(0)  # (T,) float64
        # With the clean end in front, so that index t + 1 is timestep t and index 0 is "no noise" (t = -1).
        self._cumprod = torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_cumprod])
        self._steps: Tensor | None = None  # what the loss needs of every timestep, on the device that it last ran on

    # Time --------------------------------------------------------------------------------------------------------

    def sample_timesteps(self, n: int, generator: torch.Generator | None = None, device=None) -> Tensor:
        """Draw n training timesteps, uniformly."""
        return torch.randint(self.num_timesteps, (n,), generator=generator, device=device)

    def timesteps_at(self, fractions: Tensor) -> Tensor:
        return (fractions.double() * self.num_timesteps).long()

    def timesteps(self, num_steps: int, spacing: Literal["even", "ddim"] = "even", shift: float = 1.0) -> Tensor:
        """The decreasing timesteps (num_steps,) that a sampler visits.

        ``even`` spreads them from T-1 to 0 inclusive, at fractional strides rounded to integers. ``ddim`` takes every
        k-th timestep from 0 on, for the integer k that gives this number of steps: what the released code calls
        "ddimN". It never visits T-1.
        """
        T = self.num_timesteps
        if shift != 1:
            raise InputError(f"shift belongs to flows, whose time is continuous; leave it at 1, got {shift}")
        if not 1 <= num_steps <= T:
            raise InputError(f"num_steps must lie between 1 and {T}, got {num_steps}")
        if spacing == "even":
            if num_steps == 1:
                return torch.tensor([T - 1])
            return torch.tensor([round(i * (T - 1) / (num_steps - 1)) for i in reversed(range(num_steps))])
        counts = {len(range(0, T, stride)): stride for stride in range(T, 0, -1)}
        if num_steps not in counts:
            nearest = sorted(sorted(counts, key=lambda n: abs(n - num_steps))[:4])
            raise InputError(
                f"no integer stride over {T} timesteps gives {num_steps} steps with spacing 'ddim'; "
                f"the nearest that do are {', '.join(map(str, nearest))}, or use spacing 'even'"
            )
        return torch.arange(0, T, counts[num_steps]).flip(0)

    def spans(self, parts: int) -> list[str]:
        edges = [-(-i * self.num_timesteps // parts) for i in range(parts + 1)]
        return [f"{first:03d}-{last - 1:03d}" for first, last in pairwise(edges)]

    def scheduled(self, scheduler: str, num_steps: int, shift: float, **settings: Any) -> tuple[Any, Tensor]:
        """A scheduler of diffusers with this schedule, and its timesteps: evenly spaced from T-1 on."""
        betas = (1 - self._cumprod[1:] / self._cumprod[:-1]).cpu().numpy()
        made = scheduler_of(scheduler, trained_betas=betas, timestep_spacing="linspace", **settings)
        made.set_timesteps(num_steps)
        return made, made.timesteps.long()

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) of timesteps t (N,), each (N, 1, 1, 1) in float32; t = -1 is clean data: (1, 0)."""
        alphas_cumprod = self._cumprod_at(t)
        return alphas_cumprod.sqrt().float(), (1 - alphas_cumprod).sqrt().float()

    def _cumprod_at(self, t: Tensor) -> Tensor:
        if self._cumprod.device != t.device:
            self._cumprod = self._cumprod.to(t.device)  # once: schedules move to the device that first asks
        return self._cumprod[t + 1][:, None, None, None]  # (N, 1, 1, 1) float64

    # The denoiser's answer, and a step back ------------------------------------------------------------------------

    def predict(self, model: Denoiser, x_t: Tensor, t: Tensor, y: Tensor) -> Prediction:
        eps, variance = split_variance(model(x_t, t, y), x_t.shape[1])
        alpha, sigma = self.scales(t)
        x0 = (x_t - sigma * eps) / alpha
        if self.clip_x0:
            x0 = x0.clamp(-1, 1)
            eps = (x_t - alpha * x0) / sigma
        return Prediction(x0, eps, variance)

    def posterior_mean(self, x0: Tensor, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Mean of q(x_s | x_t, x0) for s < t: Ho et al. 2020, equation 7, with beta = 1 - cumprod_t / cumprod_s between
        the two timesteps.
        """
        cumprod_t, cumprod_s = self._cumprod_at(t), self._cumprod_at(s)
        beta = 1 - cumprod_t / cumprod_s
        of_x0 = (beta * cumprod_s.sqrt() / (1 - cumprod_t)).float()  # (N, 1, 1, 1)
        of_x_t = ((1 - cumprod_s) * (1 - beta).sqrt() / (1 - cumprod_t)).float()  # (N, 1, 1, 1)
        return of_x0 * x0 + of_x_t * x_t

    def posterior_log_variance(self, t: Tensor, s: Tensor) -> Tensor:
        """Log-variance (N, 1, 1, 1) of q(x_s | x_t, x0).

        For s = -1 the variance is zero; the logarithm returned is that of the step from timestep 1 to 0 (Nichol &
        Dhariwal 2021, section 3.1).
        """
        last = s < 0  # the step to clean data borrows the variance of the step from timestep 1 to 0
        t, s = torch.where(last, 1, t), torch.where(last, 0, s)
        cumprod_t, cumprod_s = self._cumprod_at(t), self._cumprod_at(s)
        return ((1 - cumprod_t / cumprod_s) * (1 - cumprod_s) / (1 - cumprod_t)).log().float()  # (N, 1, 1, 1)

    def log_variance(self, variance: Tensor | None, t: Tensor, s: Tensor) -> Tensor:
        """Log-variance of the denoiser's step from t to s; a learned one lies between the posterior's and beta's."""
        small = self.posterior_log_variance(t, s)
        large = (1 - self._cumprod_at(t) / self._cumprod_at(s)).log().float()
        if variance is not None:
            return interpolated(variance, small, large)
        if self.fixed_variance == "small":
            return small
        return torch.where((s < 0)[:, None, None, None], small, large)

    # The loss --------------------------------------------------------------------------------------------------------

    def _steps_at(self, t: Tensor) -> "Steps":
        if self._steps is None or self._steps.device != t.device:
            all_t = torch.arange(self.num_timesteps, device=t.device)
            self._steps = torch.cat(self._steps_of(all_t), 1)[:, :, 0, 0]  # (T, 5), once for each device
        return Steps(*self._steps[t][:, :, None, None, None].unbind(1))

    def _steps_of(self, t: Tensor) -> "Steps":
        """Computed in float64, which late timesteps need."""
        alpha, sigma = self.scales(t)
        cumprod_t, cumprod_s = self._cumprod_at(t), self._cumprod_at(t - 1)
        of_x0 = (1 - cumprod_t / cumprod_s) * cumprod_s.sqrt() / (1 - cumprod_t)
        small, large = self.posterior_log_variance(t, t - 1), (1 - cumprod_t / cumprod_s).log().float()
        return Steps(alpha, sigma, (-of_x0 * ((1 - cumprod_t) / cumprod_t).sqrt()).float(), small, large)

    def loss(
        self,
        model: Denoiser,
        x0: Tensor,
        y: Tensor,
        generator: torch.Generator | None = None,
        t: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Per-sample terms (N,) of the training loss: ``loss``, ``mse``, and ``vlb`` where the variance is learned.

        ``mse`` is the mean squared error of the noise; ``vlb`` the bound's term for the drawn timestep in bits per
        dimension, through which no gradient reaches the mean (Nichol & Dhariwal 2021, section 3.1);
        loss = mse + vlb_weight * vlb. ``t`` (N,) and ``noise`` (like x0) are drawn from ``generator`` unless given.
        """
        if t is None:
            t = self.sample_timesteps(len(x0), generator, x0.device)
        if noise is None:
            noise = torch.randn(x0.shape, generator=generator, device=x0.device, dtype=x0.dtype)
        steps = self._steps_at(t)
        x_t = torch.addcmul(steps.alpha * x0, steps.sigma, noise)
        return self._terms(model(x_t, t, y), x0, noise, t, steps)

    def _terms(self, out: Tensor, x0: Tensor, noise: Tensor, t: Tensor, steps: "Steps") -> dict[str, Tensor]:
        eps, variance = split_variance(out, x0.shape[1])
        error = eps - noise
        mse = error.square().flatten(1).mean(1)  # (N,)
        if variance is None or self.vlb_weight == 0:
            return {"loss": mse, "mse": mse}
        # The posterior's means, given the true x0 and given the predicted one, differ by a multiple of that error.
        difference = steps.deviation * error.detach()
        log_variance = interpolated(variance, steps.small, steps.large)
        kl = gaussian_kl(0, steps.small, difference, log_variance)
        nll = -discretized_gaussian_log_likelihood(x0, x0 + difference, log_variance / 2)  # at t = 0 the mean is x0
        vlb = torch.where((t == 0)[:, None, None, None], nll, kl).flatten(1).mean(1) / math.log(2)  # (N,)
        return {"loss": mse + self.vlb_weight * vlb, "mse": mse, "vlb": vlb}

    def compile(self) -> None:
        """Compile what the loss does with the denoiser's answer: one kernel instead of a hundred."""
        self._terms = torch.compile(self._terms, dynamic=False)


class Steps(NamedTuple):
    """What the loss needs of timesteps t (N,) and the steps from t to t - 1, each (N, 1, 1, 1) in float32."""

    alpha: Tensor
    sigma: Tensor
    deviation: Tensor  # of the posterior's mean, for each unit by which the noise is off
    small: Tensor  # log-variance of the posterior
    large: Tensor  # log of beta


def split_variance(out: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
    """A denoiser's output (N, C or 2C, H, W) as float32 noise and raw variance, the latter None where not predicted."""
    out = out.float()
    return (out[:, :channels], out[:, channels:]) if out.shape[1] == 2 * channels else (out, None)


def interpolated(variance: Tensor, small: Tensor, large: Tensor) -> Tensor:
    """Between two log-variances by a raw output in [-1, 1] (Nichol & Dhariwal 2021, equation 15)."""
    return torch.lerp(small, large, (variance + 1) / 2)


def gaussian_kl(mean1: Tensor | float, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N1 || N2) in nats, elementwise."""
    return 0.5 * (
        log_variance2
        - log_variance1
        - 1
        + (log_variance1 - log_variance2).exp()
        + (mean1 - mean2).square() * (-log_variance2).exp()
    )


def discretized_gaussian_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log-probability in nats of x as 8-bit values in [-1, 1] under a Gaussian, elementwise (Ho et al. 2020, eq. 13).

    The normal distribution function is its tanh approximation and the bins are those of 8-bit pixels although DiT's
    data are latents: deliberately so, since the released models were trained with it.
    """

    def cdf(z: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    half_bin = 1 / 255
    scale = (-log_std).exp()
    upper = cdf(scale * (x - mean + half_bin))
    lower = cdf(scale * (x - mean - half_bin))
    probability = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return probability.clamp(min=1e-12).log()
