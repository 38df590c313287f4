"""The random numbers of a training step: a function of (seed, step), whatever ran before and on however many ranks."""

from collections.abc import Callable

import torch
from torch import Tensor

from ditlit.diffusion.noise import mix


class StepRandomness:
    """Draws for the whole global batch of one optimizer step, of which this process keeps its rows.

    So a resumed run needs no state of a random number generator, and a run on eight devices draws what it would have
    drawn on one. The cost is small: the noise of a batch of 256 latents of 4x32x32 is one million numbers.

    Args:
        seed: of the run.
        step: number of the optimizer step.
        global_batch_size: rows to draw.
        rows: those of this process and micro-batch.
        device: to draw on.
    """

    def __init__(self, seed: int, step: int, global_batch_size: int, rows: slice, device: torch.device):
        self.n = global_batch_size
        self.rows = rows
        self.device = device
        self.generator = torch.Generator(device).manual_seed(mix(seed, step))

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers (N, *shape)."""
        return torch.randn(self.n, *shape, generator=self.generator, device=self.device, dtype=torch.float32)[self.rows]

    def uniform(self) -> Tensor:
        """Uniform numbers (N,) in [0, 1)."""
        return torch.rand(self.n, generator=self.generator, device=self.device, dtype=torch.float32)[self.rows]

    def timesteps(self, sample_timesteps: Callable[..., Tensor]) -> Tensor:
        """Timesteps (N,) as the process distributes them."""
        return sample_timesteps(self.n, self.generator, self.device)[self.rows]
