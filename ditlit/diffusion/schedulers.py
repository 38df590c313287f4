"""Fast samplers of diffusers on our processes: DPM-Solver++, UniPC and DEIS."""

from typing import Any

import torch
from torch import Tensor

from ditlit.diffusion.process import Denoiser, Generators, Process, StepCallback
from ditlit.diffusion.samplers import model_at


def dpm_solver(*args: Any, **kwargs: Any) -> Tensor:
    """DPM-Solver++ (Lu et al. 2022, arXiv 2211.01095) of second order; arguments as for :func:`scheduled`."""
    settings = dict(algorithm_type="dpmsolver++", final_sigmas_type="zero")
    return scheduled("DPMSolverMultistepScheduler", settings, *args, **kwargs)


def unipc(*args: Any, **kwargs: Any) -> Tensor:
    """UniPC (Zhao et al. 2023, arXiv 2302.04867) of second order; arguments as for :func:`scheduled`."""
    return scheduled("UniPCMultistepScheduler", dict(final_sigmas_type="zero"), *args, **kwargs)


def deis(*args: Any, **kwargs: Any) -> Tensor:
    """DEIS (Zhang & Chen 2023, arXiv 2204.13902) of second order; arguments as for :func:`scheduled`."""
    return scheduled("DEISMultistepScheduler", {}, *args, **kwargs)


@torch.no_grad()
def scheduled(
    scheduler: str,
    settings: dict[str, Any],
    process: Process,
    model: Denoiser,
    noise: Tensor,
    y: Tensor,
    timesteps: Tensor,
    generator: Generators = None,
    callback: StepCallback | None = None,
    shift: float = 1.0,
) -> Tensor:
    """Sample with a deterministic scheduler of diffusers, which visits as many timesteps as there are here.

    The other arguments and the result are those of :func:`ditlit.diffusion.ddpm`.
    """
    made, visited = process.scheduled(scheduler, len(timesteps), shift, **settings)
    x = noise
    for step, t in enumerate(visited.tolist()):
        prediction = process.predict(model_at(model, t), x, torch.full((len(x),), t, device=x.device), y)
        x = made.step(prediction.x0, made.timesteps[step], x).prev_sample
        if callback:
            callback(step, t, x, prediction.x0)
    return x
