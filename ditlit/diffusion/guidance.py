"""Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598) as a wrapper that is itself a denoiser."""

import torch
from torch import Tensor

from ditlit.diffusion.process import Denoiser
from ditlit.errors import InputError
from ditlit.settings.sampling import check_guidance


class ClassifierFreeGuidance:
    """eps = eps(null) + scale * (eps(y) - eps(null)); scale 1 is the conditional model, 0 the unconditional one.

    Both halves run as one batch; the unconditional half is not computed where it has no effect. Variances are the
    conditional model's, as are the noise channels that are not guided.

    Args:
        model: the denoiser to guide.
        scale: guidance scale.
        null_label: the label that means "no class": K of this model.
        channels: guide only the first so many noise channels; all by default. The paper's numbers guide 3 of 4.
        interval: guide only at timesteps lowest <= t <= highest (Kynkäänniemi et al. 2024, arXiv 2404.07724).
    """

    def __init__(
        self,
        model: Denoiser,
        scale: float,
        null_label: int,
        channels: int | None = None,
        interval: tuple[float, float] | None = None,
    ):
        check_guidance(scale, channels, interval)
        self.model = model
        self.scale = scale
        self.null_label = null_label
        self.channels = channels
        self.interval = interval

    def __call__(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if self.scale == 1 or self.interval is None:
            return self.at(0)(x_t, t, y)
        low, high = self.interval
        inside = ((t >= low) & (t <= high))[:, None, None, None]  # (N, 1, 1, 1)
        return torch.where(inside, self._guided(x_t, t, y), self.model(x_t, t, y))

    def at(self, t: float) -> Denoiser:
        """The denoiser for samples that are all at timestep ``t``: the device need not be asked where they are."""
        outside = self.interval is not None and not self.interval[0] <= t <= self.interval[1]
        return self.model if self.scale == 1 or outside else self._guided

    def _guided(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        channels = x_t.shape[1]
        if self.channels is not None and self.channels > channels:
            raise InputError(f"cannot guide {self.channels} channels of latents that have {channels}")
        n = self.channels or channels
        null = torch.full_like(y, self.null_label)
        out = self.model(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([y, null]))  # (2N, C or 2C, H, W)
        conditional, unconditional = out.chunk(2)
        eps = unconditional[:, :n] + self.scale * (conditional[:, :n] - unconditional[:, :n])
        return torch.cat([eps, conditional[:, n:]], dim=1)  # (N, C or 2C, H, W)
