"""What a wrong scaling factor of the latents does to a denoiser."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ditlit.diffusion import Process
from ditlit.diffusion.process import Denoiser


@torch.no_grad()
def losses_at_scales(
    denoiser: Denoiser,
    process: Process,
    x0: Tensor,
    y: Tensor,
    factors: Sequence[float],
    timesteps: Tensor,
    noise: Tensor,
) -> Tensor:
    """Mean squared error of the noise, (F, M), where latents arrive multiplied by each of F factors.

    Args:
        x0: latents as the denoiser should see them (N, C, H, W), with labels y (N,) and noise like x0.
        factors: 1 is right; 5.49 is SD's factor 0.18215 forgotten, 0.18215 the same applied twice.
        timesteps: (M,).
    """
    return torch.stack(
        [
            torch.stack(
                [
                    process.loss(denoiser, factor * x0, y, t=torch.full_like(y, t), noise=noise)["mse"].mean()
                    for t in timesteps.tolist()
                ]
            )
            for factor in factors
        ]
    )


@torch.no_grad()
def predictions_at_scales(
    denoiser: Denoiser,
    process: Process,
    x0: Tensor,
    y: Tensor,
    factors: Sequence[float],
    t: int,
    noise: Tensor,
) -> Tensor:
    """What the denoiser takes the clean latents to be at timestep t, (F, N, C, H, W), divided by the factor again.

    Arguments as for :func:`losses_at_scales`.
    """
    times = torch.full_like(y, t)
    return torch.stack(
        [
            process.predict(denoiser, process.noised(factor * x0, times, noise), times, y).x0 / factor
            for factor in factors
        ]
    )
