"""Where the patches of a picture look."""

import torch
from torch import Tensor, nn

from ditlit.errors import InputError
from ditlit.models.probes import attention_logits, blocks_of, watch_attention


@torch.no_grad()
def attention_maps(denoiser: nn.Module, x_t: Tensor, t: Tensor, y: Tensor, block: int) -> Tensor:
    """The weights of one block's self-attention, (N, heads, T, T): row i says how much token i takes from every token.

    The picture's tokens come first, row by row.

    Args:
        x_t, t, y: arguments of the denoiser, (N, C, H, W), (N,) and (N,).
        block: number of the block; negative ones count from the end.

    Raises:
        InputError: where there is no such block.
    """
    depth = len(blocks_of(denoiser))
    if not -depth <= block < depth:
        raise InputError(f"there is no block {block}: this denoiser has blocks 0 to {depth - 1}")
    found: list[Tensor] = []

    def see(number: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        if number == block % depth:
            found.append(attention_logits(q, k).softmax(-1))

    with watch_attention(denoiser, see):
        denoiser(x_t, t, y)
    return found[0]


def attended_distance(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """How far each head looks, in patches: the mean distance between a patch and those that it takes from, (N, heads).

    Args:
        maps: attention weights (N, heads, T, T). Tokens after those of the picture, which blocks conditioned in context
            have, are left out.
        grid: (h, w) of the picture's patches.

    Raises:
        InputError: where there are fewer tokens than patches.
    """
    h, w = grid
    if maps.shape[-1] < h * w:
        raise InputError(f"maps of {maps.shape[-1]} tokens are not those of a picture of {h}x{w} patches")
    maps = maps[..., : h * w, : h * w]
    rows, columns = torch.arange(h).repeat_interleave(w), torch.arange(w).repeat(h)
    places = torch.stack([rows, columns], 1).float().to(maps.device)  # (T, 2)
    return ((maps * torch.cdist(places, places)).sum(-1) / maps.sum(-1)).mean(-1)
