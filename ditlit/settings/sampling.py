"""How samples are drawn."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from ditlit.errors import InputError


class Sampler(NamedTuple):
    """Where a sampler is, and which of the settings below it takes as arguments beside those of all samplers."""

    path: str
    takes: tuple[str, ...] = ()


# A new sampler is one line. Its function has the arguments of ``ditlit.diffusion.samplers.ddpm``; which processes it
# can walk is in their attribute ``samplers``.
SAMPLERS = {
    "ddpm": Sampler("ditlit.diffusion.samplers.ddpm"),
    "ddim": Sampler("ditlit.diffusion.samplers.ddim", ("eta",)),
    "euler": Sampler("ditlit.diffusion.samplers.ddim"),  # of a flow: the same step
    "heun": Sampler("ditlit.diffusion.samplers.heun"),
    "sde": Sampler("ditlit.diffusion.samplers.sde"),
    "dpm++": Sampler("ditlit.diffusion.schedulers.dpm_solver", ("shift",)),
    "unipc": Sampler("ditlit.diffusion.schedulers.unipc", ("shift",)),
    "deis": Sampler("ditlit.diffusion.schedulers.deis", ("shift",)),
}


@dataclass(frozen=True)
class Sampling:
    """How samples are drawn.

    Args:
        sampler: ddpm or ddim for DDPM's process; euler, ddim (the same steps), heun (two evaluations a step) or sde
            for flows; or a fast solver of diffusers: dpm++, unipc, and deis for DDPM's process.
        num_steps: number of denoising steps.
        spacing: how they are spread over the schedule: even, or ddim for the released code's "ddimN".
        eta: noise of DDIM's steps, from 0 (none) to 1.
        shift: of a flow's timesteps: more than 1 spends more steps near noise; t becomes shift t / (1 + (shift - 1) t).
        guidance_scale: strength of classifier-free guidance; 1 is none, 4 makes pictures like the paper's.
        guidance_channels: guide only the first so many channels; all by default. The paper's numbers guide 3.
        guidance_interval: guide only at timesteps between these two, both included: LOWEST,HIGHEST. They run from 0 to
            T-1, and in flows from 0 to 1.

    Raises:
        InputError: for settings that are not finite numbers or contradict each other.
    """

    sampler: Literal[tuple(SAMPLERS)] = "ddim"
    num_steps: int = 50
    spacing: Literal["even", "ddim"] = "even"
    eta: float = 0.0
    shift: float = 1.0
    guidance_scale: float = 4.0
    guidance_channels: int | None = None
    guidance_interval: tuple[float, float] | str | None = None

    def __post_init__(self):
        object.__setattr__(self, "guidance_interval", interval_of(self.guidance_interval))
        if self.sampler == "ddpm" and self.eta:
            raise InputError("eta belongs to the ddim sampler; ddpm takes its noise from the variance")
        if self.sampler not in ("ddpm", "ddim") and (self.eta or self.spacing != "even"):
            raise InputError(f"{self.sampler} is evenly spaced and has no eta: leave eta and spacing alone")
        if not (math.isfinite(self.shift) and self.shift > 0):
            raise InputError(f"shift is a positive number, got {self.shift}")
        if not 0 <= self.eta <= 1:
            raise InputError(f"eta lies between 0 and 1, got {self.eta}")
        check_guidance(self.guidance_scale, self.guidance_channels, self.guidance_interval)

    def check(self, process: Any, channels: int) -> None:
        """Raise InputError for settings that do not fit a process or latents of so many channels."""
        if self.sampler not in process.samplers:
            raise InputError(
                f"{self.sampler} is no sampler for {type(process).__name__}; choose {', '.join(process.samplers)}"
            )
        process.timesteps(self.num_steps, self.spacing, self.shift)
        if self.guidance_channels is not None and self.guidance_channels > channels:
            raise InputError(f"cannot guide {self.guidance_channels} channels of latents that have {channels}")


def check_guidance(scale: float, channels: int | None, interval: tuple[float, float] | None) -> None:
    """Raise InputError for settings of guidance that make no sense."""
    if not math.isfinite(scale):
        raise InputError(f"guidance_scale must be a finite number, got {scale}")
    if channels is not None and channels < 1:
        raise InputError(f"guidance needs at least one channel to guide, got {channels}")
    if interval is not None and interval[0] > interval[1]:
        raise InputError(f"guidance interval {interval} has its lowest timestep above its highest")


def interval_of(value: str | Sequence[float] | None) -> tuple[float, float] | None:
    """Two timesteps, as a command line or a YAML file may write them: ``100,900``, ``[0.1, 0.9]``."""
    if value is None:
        return None
    words = value.strip(" []()").split(",") if isinstance(value, str) else value
    try:
        low, high = (float(word) for word in words)
    except (TypeError, ValueError):
        raise InputError(f"guidance_interval takes two timesteps, LOWEST,HIGHEST, got {value!r}") from None
    return whole(low), whole(high)


def whole(number: float) -> float:
    return int(number) if number.is_integer() else number
