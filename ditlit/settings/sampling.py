"""How samples are drawn."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ditlit.errors import InputError

# Name -> where the function is, with the arguments of ``ditlit.diffusion.samplers.ddpm``. A new sampler is one line.
SAMPLERS = {
    "ddpm": "ditlit.diffusion.samplers.ddpm",
    "ddim": "ditlit.diffusion.samplers.ddim",
    "dpm++": "ditlit.diffusion.schedulers.dpm_solver",
    "unipc": "ditlit.diffusion.schedulers.unipc",
    "deis": "ditlit.diffusion.schedulers.deis",
}


@dataclass(frozen=True)
class Sampling:
    """How samples are drawn.

    Args:
        sampler: ddpm or ddim, or one of the fast solvers of diffusers: dpm++, unipc, deis.
        num_steps: number of denoising steps.
        spacing: how they are spread over the schedule: even, or ddim for the released code's "ddimN".
        eta: noise of DDIM's steps, from 0 (none) to 1.
        guidance_scale: strength of classifier-free guidance; 1 is none, 4 makes pictures like the paper's.
        guidance_channels: guide only the first so many channels; all by default. The paper's numbers guide 3.
        guidance_interval: guide only at timesteps between these two, both included: LOWEST,HIGHEST.

    Raises:
        InputError: for settings that are not finite numbers or contradict each other.
    """

    sampler: Literal[tuple(SAMPLERS)] = "ddim"
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
        check_guidance(self.guidance_scale, self.guidance_channels, self.guidance_interval)

    def check(self, process: Any, channels: int) -> None:
        """Raise InputError for settings that do not fit a process or latents of so many channels."""
        process.timesteps(self.num_steps, self.spacing)
        if self.guidance_channels is not None and self.guidance_channels > channels:
            raise InputError(f"cannot guide {self.guidance_channels} channels of latents that have {channels}")


def check_guidance(scale: float, channels: int | None, interval: tuple[int, int] | None) -> None:
    """Raise InputError for settings of guidance that make no sense."""
    if not math.isfinite(scale):
        raise InputError(f"guidance_scale must be a finite number, got {scale}")
    if channels is not None and channels < 1:
        raise InputError(f"guidance needs at least one channel to guide, got {channels}")
    if interval is not None and interval[0] > interval[1]:
        raise InputError(f"guidance interval {interval} has its lowest timestep above its highest")


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
