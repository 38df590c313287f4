"""Samplers: each a free function that walks a process's timesteps from noise to data."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from ditlit.diffusion.gaussian import Denoiser, Prediction
from ditlit.diffusion.guidance import Guided
from ditlit.errors import InputError

# One generator for the whole batch, or one for each sample: then a sample does not depend on its batch.
Generators = torch.Generator | Sequence[torch.Generator] | None
# Called after every step with its number from 0, the timestep it left, x_s and the predicted x0.
StepCallback = Callable[[int, int, Tensor, Tensor], None]


class Process(Protocol):
    """What the samplers ask of a diffusion process."""

    def timesteps(self, num_steps: int, spacing: str = "even") -> Tensor: ...
    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]: ...
    def predict(self, model: Denoiser, x_t: Tensor, t: Tensor, y: Tensor) -> Prediction: ...
    def posterior_mean(self, x0: Tensor, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor: ...
    def log_variance(self, variance: Tensor | None, t: Tensor, s: Tensor) -> Tensor: ...


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
    return model.at(int(t)) if isinstance(model, Guided) else model


def steps(timesteps: Tensor, x: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(number, t, s) of every step, t and s as (N,) on x's device; the last s is -1, clean data."""
    pairs = torch.stack([timesteps, torch.cat([timesteps[1:], timesteps.new_tensor([-1])])])  # (2, num_steps)
    pairs = pairs.to(x.device)[:, :, None].expand(-1, -1, len(x))  # one transfer for the whole loop
    for step in range(len(timesteps)):
        yield step, pairs[0, step], pairs[1, step]


def randn_like(x: Tensor, generator: Generators) -> Tensor:
    """Normal noise shaped like x, from one generator or from one for each sample (on whatever device they live)."""
    if generator is None:
        return torch.randn_like(x)
    if isinstance(generator, torch.Generator):
        return torch.randn(x.shape, generator=generator, device=generator.device, dtype=torch.float32).to(x)
    return normal(x.shape[1:], generator).to(x)


def normal(shape: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
    """Float32 normal noise (N, *shape), each row from its own generator."""
    return torch.stack(
        [torch.randn(tuple(shape), generator=g, device=g.device, dtype=torch.float32) for g in generators]
    )


def sample_generators(seed: int, indices: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator for each global sample index, so that a sample is the same in any batch, on any rank.

    Seeds are mixed as in splitmix64, so that neighbouring (seed, index) pairs have unrelated streams.
    """
    return [torch.Generator().manual_seed(mix(seed, int(index))) for index in indices]


def mix(*numbers: int) -> int:
    """A 63-bit seed from integers: splitmix64 (Steele et al. 2014) folded over them."""
    mask = (1 << 64) - 1
    state = 0
    for number in numbers:
        state = ((state ^ (number & mask)) + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return state >> 1


def interval_of(value: str | Sequence[int] | None) -> tuple[int, int] | None:
    """Two timesteps, as a command line or a YAML file may write them: ``100,900``, ``[100, 900]``."""
    if value is None:
        return None
    words = value.strip(" []()").split(",") if isinstance(value, str) else value
    try:
        low, high = (int(word) for word in words)
    except (TypeError, ValueError):
        raise InputError(f"guidance_interval takes two timesteps, LOWEST,HIGHEST, got {value!r}") from None
    return low, high


@dataclass(frozen=True)
class Sampling:
    """How samples are drawn; by default quickly: ``ditlit sample`` takes the paper's 250 steps of DDPM instead.

    Args:
        sampler: ddpm, ddim, or a fast solver of diffusers: dpm++, unipc or deis.
        num_steps: number of denoising steps.
        spacing: how the steps are spread over the schedule: even, or ddim for the released code's "ddimN".
        eta: noise of DDIM's steps, from 0 (deterministic) to 1.
        guidance_scale: strength of classifier-free guidance; 1 is none.
        guidance_channels: guide only the first so many channels; all by default.
        guidance_interval: guide only at timesteps between these two, both included: ``(100, 900)`` or ``"100,900"``.

    Raises:
        InputError: for settings that are not finite numbers or contradict each other.
    """

    sampler: Literal["ddpm", "ddim", "dpm++", "unipc", "deis"] = "ddim"
    num_steps: int = 50
    spacing: Literal["even", "ddim"] = "even"
    eta: float = 0.0
    guidance_scale: float = 4.0
    guidance_channels: int | None = None
    guidance_interval: tuple[int, int] | str | None = None

    def __post_init__(self):
        object.__setattr__(self, "guidance_interval", interval_of(self.guidance_interval))
        if self.sampler == "ddpm" and self.eta:
            raise InputError("eta belongs to the ddim sampler; ddpm takes its noise from the variance")
        if self.sampler not in ("ddpm", "ddim") and (self.eta or self.spacing != "even"):
            raise InputError(f"{self.sampler} is deterministic and evenly spaced: leave eta and spacing alone")
        if not 0 <= self.eta <= 1:
            raise InputError(f"eta lies between 0 and 1, got {self.eta}")
        self.guided(None, null_label=0)  # checks the settings of guidance

    def guided(self, model: Denoiser | None, null_label: int) -> Guided:
        return Guided(model, self.guidance_scale, null_label, self.guidance_channels, self.guidance_interval)

    def check(self, process: Process, channels: int) -> None:
        """Raise InputError for settings that do not fit a process or latents of so many channels."""
        process.timesteps(self.num_steps, self.spacing)
        if self.guidance_channels is not None and self.guidance_channels > channels:
            raise InputError(f"cannot guide {self.guidance_channels} channels of latents that have {channels}")

    def __call__(
        self,
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
        guided = self.guided(model, null_label)
        timesteps = process.timesteps(self.num_steps, self.spacing)
        if self.sampler == "ddpm":
            return ddpm(process, guided, noise, y, timesteps, generators, callback)
        if self.sampler == "ddim":
            return ddim(process, guided, noise, y, timesteps, generators, callback, eta=self.eta)
        from ditlit.diffusion.schedulers import scheduled  # builds on this file

        return scheduled(self.sampler, process, guided, noise, y, self.num_steps, callback)

    def check_finite(
        self,
        x0: Tensor,
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
        steps: list[tuple[int, int]] = []

        def look(step: int, t: int, x: Tensor, _: Tensor) -> None:
            if not finite(x)[row]:
                steps.append((step, t))

        self(process, model, shape, y, null_label, indices, seed, look, noise)
        since = f" from step {steps[0][0] + 1} of {self.num_steps} (timestep {steps[0][1]}) on" if steps else ""
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
