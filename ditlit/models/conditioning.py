"""The paper's other ways of telling a block about timestep and class (Peebles & Xie 2023, section 3.2 and figure 3).

adaLN-Zero, which the paper recommends, is :class:`~ditlit.models.blocks.AdaLNZeroBlock`. Where the paper's text leaves
a detail open, its counts for DiT-XL/2 decide (multiply-adds, parameters, FID after 400K steps; ours behind the arrow):

    in-context       119.37 G -> 119.371  449 M -> 449.2  35.24    two tokens more in every block
    cross-attention  137.62 G -> 137.620  598 M -> 597.9  26.14    four more D x D projections a block
    adaLN            118.56 G -> 118.564  600 M -> 600.5  25.21    four modulation vectors a block, two at the end
    adaLN-Zero       118.64 G -> 118.638  675 M -> 674.8  19.47    six, and two

The final norm is modulated with the two adaLNs alone: modulation costs 2.7 M parameters, and would make 452 M and 601 M
of the first two. Cross-attention reads the tokens without a norm of its own, which would make 137.63 G. What the counts
cannot tell, biases and the weights of the norms that nothing modulates (0.1 M), is as in any vision transformer.
Parameters are those that train: with the fixed position table adaLN would be 601 M.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditlit.models.blocks import MLP, AdaLNZeroBlock, Attention, FinalLayer, layer_norm, modulate


class InContextBlock(nn.Module):
    """A block of a vision transformer: timestep and class are two of its tokens."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, dropout: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, num_heads, dropout)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLP(width, int(width * mlp_ratio), dropout)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (N, T+2, D) tokens, the last two those of timestep and class; c is not needed again."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class CrossAttention(nn.Module):
    """Multi-head attention from (N, T, D) tokens to (N, M, D) others."""

    def __init__(self, width: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        n, tokens, width = x.shape
        q = self.q(x).reshape(n, tokens, self.num_heads, -1).transpose(1, 2)  # (N, heads, T, D/heads)
        k, v = self.kv(c).reshape(n, c.shape[1], 2, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # (N, heads, M, D/heads)
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.out(x.transpose(1, 2).reshape(n, tokens, width))  # (N, T, D)


class CrossAttentionBlock(nn.Module):
    """Self-attention, then attention to the two embeddings of timestep and class, then the MLP."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, dropout: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, num_heads, dropout)
        self.cross = CrossAttention(width, num_heads, dropout)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLP(width, int(width * mlp_ratio), dropout)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (N, T, D) tokens; c (N, 2, D) embeddings of timestep and class."""
        x = x + self.attn(self.norm1(x))
        x = x + self.cross(x, c)
        return x + self.mlp(self.norm2(x))


class AdaLNBlock(nn.Module):
    """Attention and MLP, each with shift and scale regressed from the conditioning, and no gates.

    ``modulation`` starts as every other linear layer: zeros are what adaLN-Zero adds.
    """

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, dropout: float):
        super().__init__()
        self.norm1 = layer_norm(width)
        self.attn = Attention(width, num_heads, dropout)
        self.norm2 = layer_norm(width)
        self.mlp = MLP(width, int(width * mlp_ratio), dropout)
        self.modulation = nn.Linear(width, 4 * width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (N, T, D) tokens; c (N, D) conditioning, already through its SiLU."""
        shift1, scale1, shift2, scale2 = self.modulation(c).chunk(4, dim=1)  # 4 x (N, D)
        x = x + self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + self.mlp(modulate(self.norm2(x), shift2, scale2))


class PlainFinalLayer(nn.Module):
    """Norm and a linear map to the values of each patch, where nothing modulates."""

    def __init__(self, width: int, out_features: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.linear = nn.Linear(width, out_features)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.linear(self.norm(x))  # (N, T, p*p*C)


def as_tokens(x: Tensor, time: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """The embeddings (N, D) as two tokens behind those of the picture, (N, T+2, D)."""
    c = torch.stack([time, label], 1)  # (N, 2, D)
    return torch.cat([x, c.to(x.dtype)], 1), c


def as_sequence(x: Tensor, time: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """The embeddings (N, D) as a sequence of their own, (N, 2, D)."""
    return x, torch.stack([time, label], 1)


def as_vector(x: Tensor, time: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """The embeddings (N, D) as one vector, through the SiLU that stands before every modulation."""
    return x, F.silu(time + label)


class Design(NamedTuple):
    """One way of conditioning.

    Args:
        block: class of the blocks; they map tokens (N, T, D) and conditioning c to tokens.
        final: class of the final layer, of the same arguments.
        enter: makes tokens and c of the picture's tokens (N, T, D) and the embeddings (N, D) of timestep and class.
    """

    block: type[nn.Module]
    final: type[nn.Module]
    enter: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


DESIGNS = {
    "in_context": Design(InContextBlock, PlainFinalLayer, as_tokens),
    "cross_attention": Design(CrossAttentionBlock, PlainFinalLayer, as_sequence),
    "adaln": Design(AdaLNBlock, FinalLayer, as_vector),
    "adaln_zero": Design(AdaLNZeroBlock, FinalLayer, as_vector),
}
