"""Fast samplers of diffusers on our processes: DPM-Solver++, UniPC and DEIS."""

from typing import Any

import torch
from torch import Tensor

from ditlit.diffusion.process import Denoiser, Generators, Process, StepCallback
from ditlit.diffusion.samplers import model_at


def dpm_solver(process: Process, model: Denoiser, noise: Tensor, y: Tensor, timesteps: Tensor, *rest: Any) -> Tensor:
    """DPM-Solver++ (Lu et al. 2022, arXiv 2211.01095) of second order; arguments as for :func:`scheduled`."""
    settings = dict(algorithm_type="dpmsolver++", final_sigmas_type="zero")
    scheduler = make_scheduler("DPMSolverMultistepScheduler", process, len(timesteps), **settings)
    return scheduled(scheduler, process, model, noise, y, *rest)


def unipc(process: Process, model: Denoiser, noise: Tensor, y: Tensor, timesteps: Tensor, *rest: Any) -> Tensor:
    """UniPC (Zhao et al. 2023, arXiv 2302.04867) of second order; arguments as for :func:`scheduled`."""
    scheduler = make_scheduler("UniPCMultistepScheduler", process, len(timesteps), final_sigmas_type="zero")
    return scheduled(scheduler, process, model, noise, y, *rest)


def deis(process: Process, model: Denoiser, noise: Tensor, y: Tensor, timesteps: Tensor, *rest: Any) -> Tensor:
    """DEIS (Zhang & Chen 2023, arXiv 2204.13902) of second order; arguments as for :func:`scheduled`."""
    return scheduled(make_scheduler("DEISMultistepScheduler", process, len(timesteps)), process, model, noise, y, *rest)


def make_scheduler(class_name: str, process: Process, num_steps: int, **settings: Any) -> Any:
    """A diffusers scheduler with the process's schedule and evenly spaced timesteps from T-1 on."""
    import diffusers  # slow to import, and only needed for these samplers

    alphas_cumprod = torch.cat([torch.ones(1, dtype=torch.float64), process.alphas_cumprod.cpu()])
    betas = (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).numpy()
    scheduler = getattr(diffusers, class_name)(trained_betas=betas, timestep_spacing="linspace", **settings)
    scheduler.set_timesteps(num_steps)
    return scheduler


@torch.no_grad()
def scheduled(
    scheduler: Any,
    process: Process,
    model: Denoiser,
    noise: Tensor,
    y: Tensor,
    generator: Generators = None,
    callback: StepCallback | None = None,
) -> Tensor:
    """Sample with a deterministic scheduler of diffusers, of whose timesteps there are as many as of ``timesteps``.

    Arguments and result are those of :func:`ditlit.diffusion.ddpm`.
    """
    x = noise
    for step, t in enumerate(map(int, scheduler.timesteps.tolist())):
        at_t = torch.full((len(x),), t, device=x.device)
        prediction = process.predict(model_at(model, t), x, at_t, y)
        x = scheduler.step(prediction.eps, scheduler.timesteps[step], x).prev_sample
        if callback:
            callback(step, t, x, prediction.x0)
    return x
