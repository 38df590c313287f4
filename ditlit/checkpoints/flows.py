"""Between our rectified flow and SiT's: another time, another sign, and outputs that were never trained."""

import torch
from torch import Tensor

from ditlit.models.embeddings import TimestepEmbedding, sinusoid

TIME = "time_embed.mlp.0.weight"
FINAL = ("final.linear.weight", "final.linear.bias")


def turned(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under our names that answer -v at 1 - t, of those that answer v at t; the same back.

    The features of a time are cosines and sines, and those of 1 - t are a rotation and reflection of those of t: the
    first layer of the timestep embedding takes it up. It is computed in float64.
    """
    sin, cos = (part[0] for part in sinusoid(torch.ones(1, dtype=torch.float64), TimestepEmbedding.features))
    of_cos, of_sin = state[TIME].double().chunk(2, dim=1)  # (D, 128) each
    weight = torch.cat([of_cos * cos + of_sin * sin, of_cos * sin - of_sin * cos], dim=1)
    return state | {TIME: weight.to(state[TIME].dtype)} | {name: -state[name] for name in FINAL}


def without_variance(state: dict[str, Tensor], channels: int) -> dict[str, Tensor]:
    """Weights under our names whose final layer answers so many channels of the 2C that it has."""
    return state | {name: state[name].unflatten(0, (-1, 2 * channels))[:, :channels].flatten(0, 1) for name in FINAL}


def with_empty_variance(state: dict[str, Tensor], channels: int) -> dict[str, Tensor]:
    """The inverse of :func:`without_variance`, with zeros."""
    parts = {name: state[name].unflatten(0, (-1, channels)) for name in FINAL}
    return state | {
        name: torch.cat([part, torch.zeros_like(part)], dim=1).flatten(0, 1) for name, part in parts.items()
    }
