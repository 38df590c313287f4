"""Fast samplers of diffusers on our processes: DPM-Solver++, UniPC and DEIS."""

from typing import Any

import torch
from torch import Tensor

from ditlit.diffusion.gaussian import Denoiser
from ditlit.diffusion.sampling import Process, StepCallback, model_at

# Sampler -> class of diffusers and its settings. All are multistep solvers of the same ordinary differential equation,
# deterministic, of second order.
SCHEDULERS = {
    "dpm++": ("DPMSolverMultistepScheduler", dict(algorithm_type="dpmsolver++", final_sigmas_type="zero")),
    "unipc": ("UniPCMultistepScheduler", dict(final_sigmas_type="zero")),
    "deis": ("DEISMultistepScheduler", {}),
}


def make_scheduler(name: str, process: Process, num_steps: int) -> Any:
    """A diffusers scheduler with the process's schedule and evenly spaced timesteps from T-1 on."""
    import diffusers  # slow to import, and only needed for these samplers

    class_name, settings = SCHEDULERS[name]
    abar = torch.cat([torch.ones(1, dtype=torch.float64), process.abar.cpu()])
    betas = (1 - abar[1:] / abar[:-1]).numpy()
    scheduler = getattr(diffusers, class_name)(trained_betas=betas, timestep_spacing="linspace", **settings)
    scheduler.set_timesteps(num_steps)
    return scheduler


@torch.no_grad()
def scheduled(
    name: str,
    process: Process,
    model: Denoiser,
    noise: Tensor,
    y: Tensor,
    num_steps: int,
    callback: StepCallback | None = None,
) -> Tensor:
    """Sample with a scheduler of :data:`SCHEDULERS`; arguments and result as for :func:`ditlit.diffusion.ddim`."""
    scheduler = make_scheduler(name, process, num_steps)
    x = noise
    for step, t in enumerate(map(int, scheduler.timesteps.tolist())):
        at_t = torch.full((len(x),), t, device=x.device)
        prediction = process.predict(model_at(model, t), x, at_t, y)
        x = scheduler.step(prediction.eps, scheduler.timesteps[step], x).prev_sample
        if callback:
            callback(step, t, x, prediction.x0)
    return x
