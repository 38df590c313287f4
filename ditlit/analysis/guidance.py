"""When in time the label, and with it guidance, matters."""

from typing import NamedTuple

import torch
from torch import Tensor

from ditlit.diffusion import Process
from ditlit.diffusion.gaussian import split_variance
from ditlit.diffusion.process import Denoiser


class LabelEffect(NamedTuple):
    """Root mean square difference between what the denoiser says with the label and without it, each (M, N).

    Attributes:
        noise: of the predicted noise: what guidance multiplies.
        x0: of the predicted clean latents, which is the former times sigma / alpha.
    """

    noise: Tensor
    x0: Tensor


@torch.no_grad()
def label_effect(
    denoiser: Denoiser, process: Process, x0: Tensor, y: Tensor, timesteps: Tensor, noise: Tensor
) -> LabelEffect:
    """The label's effect on samples x0 (N, C, H, W) with labels y (N,) and noise like x0, at timesteps (M,)."""
    null = torch.full_like(y, denoiser.num_classes)
    found = []
    for t in timesteps.tolist():
        t = torch.full_like(y, t)
        alpha, sigma = process.scales(t)
        x_t = process.noised(x0, t, noise)
        with_label, without = (split_variance(denoiser(x_t, t, label), x0.shape[1])[0] for label in (y, null))
        difference = (with_label - without).flatten(1).square().mean(1).sqrt()  # (N,)
        found.append(torch.stack([difference, difference * (sigma / alpha).flatten()]))
    return LabelEffect(*torch.stack(found, 1))
