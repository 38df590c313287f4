"""The gates of adaLN-Zero, and how much of the identity is left in a block."""

import torch
from torch import Tensor, nn

from ditlit.errors import InputError
from ditlit.models.blocks import AdaLNZeroBlock
from ditlit.models.probes import blocks_of, watch, watch_blocks

ATTENTION, MLP = 0, 1  # the second axis of gate_values


@torch.no_grad()
def gate_values(denoiser: nn.Module, t: Tensor, y: Tensor) -> Tensor:
    """The gates of every block at timesteps t (M,) and labels y (M,): (depth, 2, M, D), attention's first.

    A gate multiplies what its branch adds to the tokens, channel by channel. All gates of a fresh model are zero, so
    that every block begins as the identity.

    Raises:
        InputError: for a denoiser whose blocks have no gates.
    """
    blocks = blocks_of(denoiser)
    other = next((block for block in blocks if not isinstance(block, AdaLNZeroBlock)), None)
    if other is not None:
        raise InputError(
            f"gates belong to adaLN-Zero, and this denoiser's {type(other).__name__} has none; block_changes tells for "
            "any design how much a block does"
        )
    found: dict[int, Tensor] = {}

    def see(number: int, _: Tensor, modulation: Tensor) -> None:
        _, _, gate1, _, _, gate2 = modulation.chunk(6, dim=1)  # each (M, D)
        found[number] = torch.stack([gate1, gate2])  # (2, M, D)

    x_t = torch.zeros(len(t), denoiser.in_channels, *denoiser.input_size, device=t.device)  # gates do not depend on it
    with watch(denoiser, [block.modulation for block in blocks], see):
        denoiser(x_t, t, y)
    return torch.stack([found[number] for number in range(len(blocks))])


@torch.no_grad()
def block_changes(denoiser: nn.Module, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """|block(x) - x| / |x| over the tokens of each sample: (depth, N). 0 is a block that is the identity.

    Arguments are those of the denoiser; x_t is (N, C, H, W).
    """
    found = torch.zeros(len(blocks_of(denoiser)), len(t), device=t.device)

    def see(number: int, before: Tensor, after: Tensor) -> None:
        before, after = before.float().flatten(1), after.float().flatten(1)
        found[number] = (after - before).norm(dim=1) / before.norm(dim=1)

    with watch_blocks(denoiser, see):
        denoiser(x_t, t, y)
    return found
