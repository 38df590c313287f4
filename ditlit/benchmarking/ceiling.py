"""The fastest that this device multiplies matrices as large as the model's: the ceiling of its utilisation."""

import torch
import torch.nn.functional as F

from ditlit.benchmarking.gauges import mark, seconds_between
from ditlit.models import DiT

LONG_ENOUGH = 0.02  # seconds of products that are timed at once
MOST = 50


class Products:
    """The two products of a DiT's MLP, (N*T, D) by (D, 4D) and back, and nothing else; a call repeats them.

    Args:
        denoiser: whose sizes they have.
        n: samples N in a batch.
        dtype: in which the model multiplies.
        device: to run on.
    """

    def __init__(self, denoiser: DiT, n: int, dtype: torch.dtype, device: torch.device):
        hidden, width = denoiser.blocks[0].mlp.fc_in.weight.shape
        self.shape = (n * denoiser.grid[0] * denoiser.grid[1], width, hidden)
        self.dtype = dtype
        rows = self.shape[0]
        self.x = torch.randn(rows, width, device=device, dtype=dtype)
        self.up = torch.randn(hidden, width, device=device, dtype=dtype) / width**0.5
        self.down = torch.randn(width, hidden, device=device, dtype=dtype) / hidden**0.5
        self.count = 1
        for _ in range(2):
            self()
        start = mark(device)
        self()
        seconds = seconds_between(start, mark(device))
        self.count = min(max(round(LONG_ENOUGH / seconds), 1), MOST)

    @property
    def flops(self) -> int:
        """Floating-point operations of a call."""
        rows, width, hidden = self.shape
        return self.count * 4 * rows * width * hidden

    @torch.no_grad()
    def __call__(self) -> None:
        for _ in range(self.count):
            F.linear(F.linear(self.x, self.up), self.down)  # (N*T, D)
