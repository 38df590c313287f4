"""How large the values inside a denoiser are."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ditlit.models.probes import blocks_of, largest_logit, watch_attention, watch_blocks


class Sizes(NamedTuple):
    """Of every block and sample, each (depth, N).

    Attributes:
        norm: mean length of a token after the block, divided by sqrt(D): the root mean square of its values.
        largest: largest absolute value of the tokens after the block.
        logit: largest q.k / sqrt(d) of the block's self-attention.
    """

    norm: Tensor
    largest: Tensor
    logit: Tensor


@torch.no_grad()
def sizes(denoiser: nn.Module, x_t: Tensor, t: Tensor, y: Tensor) -> Sizes:
    """Sizes at these arguments of the denoiser, (N, C, H, W), (N,) and (N,)."""
    found = Sizes(*torch.zeros(3, len(blocks_of(denoiser)), len(t), device=t.device))

    def see_block(number: int, _: Tensor, after: Tensor) -> None:
        after = after.float()
        found.norm[number] = after.square().mean(-1).sqrt().mean(1)
        found.largest[number] = after.abs().amax((1, 2))

    def see_attention(number: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        found.logit[number] = largest_logit(q, k)

    with watch_blocks(denoiser, see_block), watch_attention(denoiser, see_attention):
        denoiser(x_t, t, y)
    return found
