"""What enters the transformer: patches, positions, time and class (Peebles & Xie 2023, section 3.2)."""

import math

import torch
from torch import Tensor, nn


def patchify(x: Tensor, p: int) -> Tensor:
    """Cut a (N, C, H, W) grid into (N, T, C*p*p) tokens, row by row."""
    n, c, h, w = x.shape
    x = x.reshape(n, c, h // p, p, w // p, p)  # (N, C, h, p, w, p)
    x = x.permute(0, 2, 4, 1, 3, 5)  # (N, h, w, C, p, p)
    return x.flatten(3).flatten(1, 2)  # (N, T, C*p*p)


def unpatchify(x: Tensor, p: int, grid: tuple[int, int]) -> Tensor:
    """Lay (N, T, p*p*C) tokens out as (N, C, H, W); ``grid`` is (H/p, W/p).

    Inside a token the order is (row, column, channel), as in the released weights; patchify's is (channel, row,
    column).
    """
    n = x.shape[0]
    h, w = grid
    x = x.reshape(n, h, w, p, p, -1)  # (N, h, w, p, p, C)
    x = x.permute(0, 5, 1, 3, 2, 4)  # (N, C, h, p, w, p)
    return x.reshape(n, -1, h * p, w * p)  # (N, C, H, W)


def sinusoid(positions: Tensor, dim: int, max_period: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """Sine and cosine of ``positions`` (M,) at dim/2 frequencies falling geometrically from 1 to 1/max_period.

    Returns (sin, cos), each (M, dim/2). Vaswani et al. 2017, section 3.5.
    """
    half = dim // 2
    frequencies = torch.exp(
        -math.log(max_period) * torch.arange(half, dtype=positions.dtype, device=positions.device) / half
    )
    angles = positions[:, None] * frequencies[None]  # (M, dim/2)
    return angles.sin(), angles.cos()


def sincos_positions(width: int, grid: tuple[int, int]) -> Tensor:
    """The fixed 2-D position table, (T, D): half of the width for each axis, [sin, cos] within it.

    The horizontal axis comes first, as in the released weights. Computed in float64.
    """
    h, w = grid
    rows = torch.arange(h, dtype=torch.float64).repeat_interleave(w)  # (T,)
    columns = torch.arange(w, dtype=torch.float64).repeat(h)  # (T,)
    return torch.cat([*sinusoid(columns, width // 2), *sinusoid(rows, width // 2)], dim=1).float()  # (T, D)


class TimestepEmbedding(nn.Module):
    """t (N,) -> (N, D): [cos, sin] features through a two-layer MLP."""

    features = 256

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(self.features, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        sin, cos = sinusoid(t.float(), self.features)  # in float32: t up to 999 has no room in 16 bits
        return self.mlp(torch.cat([cos, sin], dim=1).to(self.mlp[0].weight.dtype))  # (N, D)
