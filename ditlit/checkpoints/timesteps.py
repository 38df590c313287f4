"""The timestep embedder for diffusers, whose DiT computes other frequencies than the paper's.

Both feed 128 cosines and sines of t to a two-layer MLP. DiT's frequencies are 10000^(-i/128); diffusers' class, with
nothing to configure it, has 10000^(-i/127). Weights that are copied unchanged, as diffusers' own conversion does, give
another embedding: by t = 999 a middle frequency is off by half a turn. So the MLP is fitted anew to what the model
computes at every timestep. Where it is at least as wide as there are timesteps (DiT-L and DiT-XL) its hidden layer can
tell all timesteps apart and the fit is exact to rounding; below that it is the least-squares fit, an approximation.
"""

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor

from ditlit.models.embeddings import TimestepEmbedding, sinusoid

MLP = ("time_embed.mlp.0.weight", "time_embed.mlp.0.bias", "time_embed.mlp.2.weight", "time_embed.mlp.2.bias")
HALF = TimestepEmbedding.features // 2
DIFFUSERS_PERIOD = 10_000 ** (HALF / (HALF - 1))  # the max_period at which our frequencies are diffusers'
SPREAD = 0.2  # of random weights that make hidden units differ: less asks for more than float32, more for whole t


def refitted(state: dict[str, Tensor], num_timesteps: int) -> tuple[dict[str, Tensor], float]:
    """Weights of the timestep MLP for diffusers' frequencies.

    Returns:
        The four tensors of the MLP under our names, and the relative error that is left: root mean square over all
        timesteps, relative to the deviation of the embedding from its mean over time.
    """
    t = torch.arange(num_timesteps, dtype=torch.float64)
    w1, b1, w2, b2 = (state[name].double() for name in MLP)
    hidden = features(t) @ w1.T + b1  # (T, D)
    target = F.silu(hidden) @ w2.T + b2  # (T, D)

    theirs = with_one(features(t, DIFFUSERS_PERIOD))  # (T, 257)
    first = least_squares(theirs, hidden, 1e-4)  # (257, D)
    if len(b1) >= num_timesteps - 1:
        noise = torch.randn(first.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        first = first + SPREAD * noise
        precision = 1e-8
    else:
        precision = 1e-6
    second = least_squares(with_one(F.silu(theirs @ first)), target, precision)  # (D + 1, D)

    fitted = (first[:-1].T, first[-1], second[:-1].T, second[-1])
    fitted = {name: value.to(state[name].dtype).contiguous() for name, value in zip(MLP, fitted, strict=True)}
    w1, b1, w2, b2 = (fitted[name].double() for name in MLP)
    error = F.silu(theirs[:, :-1] @ w1.T + b1) @ w2.T + b2 - target
    return fitted, (error.norm() / (target - target.mean(0)).norm().clamp(min=1e-30)).item()


def features(t: Tensor, max_period: float = 10_000.0) -> Tensor:
    """What the MLP is fed: [cos, sin] of t (T,), (T, 256)."""
    sin, cos = sinusoid(t, 2 * HALF, max_period)
    return torch.cat([cos, sin], dim=1)


def with_one(x: Tensor) -> Tensor:
    """x (T, F) and a column of ones, for a bias: (T, F + 1)."""
    return torch.cat([x, torch.ones_like(x[:, :1])], dim=1)


def least_squares(x: Tensor, y: Tensor, precision: float) -> Tensor:
    """The w that brings x @ w closest to y, damped in directions of x smaller than ``precision``: none is blown up."""
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    damped = s / (s.square() + (precision * s[0]).square())
    return vt.T @ (damped[:, None] * (u.T @ y))


def fingerprint(state: dict[str, Tensor]) -> str:
    """SHA-256 of the bytes of the timestep MLP."""
    digest = hashlib.sha256()
    for name in MLP:
        digest.update(state[name].detach().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
