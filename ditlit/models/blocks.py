"""The adaLN-Zero transformer block and the final layer (Peebles & Xie 2023, figure 3)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (N, T, D) scaled by 1 + ``scale`` and moved by ``shift``, both (N, D)."""
    return torch.addcmul(shift[:, None], x, 1 + scale[:, None])


def gated(x: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """x (N, T, D) and its update (N, T, D), times the gate (N, D)."""
    if x.is_cuda and torch.is_autocast_enabled("cuda"):
        return x + gate[:, None] * update  # autocast would bring all of addcmul's arguments to float32 first
    return torch.addcmul(x, gate[:, None], update)


def layer_norm(width: int) -> nn.LayerNorm:
    # No affine: scale and shift come from the conditioning.
    return nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)


def products_are_faster(q: Tensor) -> bool:
    """Whether training with queries (N, heads, T, d) does better without the fused attention kernel.

    On CPUs that is so in 16 bits and for few tokens: there the kernel's backward pass takes several times as long as
    its products.
    """
    return q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16) and q.shape[2] <= 256


def attention_by_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v of queries, keys and values (N, heads, T, d), with all T*T weights in memory."""
    n, heads, tokens, dim = q.shape
    q, k, v = (x.reshape(n * heads, tokens, dim) for x in (q * dim**-0.5, k, v))  # (N*heads, T, d)
    weights = torch.bmm(q, k.transpose(1, 2)).softmax(-1)  # (N*heads, T, T)
    return torch.bmm(weights, v).view(n, heads, tokens, dim)  # (N, heads, T, d)


class Attention(nn.Module):
    """Multi-head self-attention over (N, T, D)."""

    def __init__(self, width: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        qkv = self.qkv(x).reshape(n, tokens, 3, self.num_heads, width // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # 3 x (N, heads, T, D/heads)
        dropout = self.dropout if self.training else 0.0
        if torch.is_grad_enabled() and not dropout and products_are_faster(q):
            x = attention_by_products(q, k, v)  # (N, heads, T, D/heads)
        else:
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)  # (N, heads, T, D/heads)
        return self.out(x.transpose(1, 2).reshape(n, tokens, width))  # (N, T, D)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in its tanh approximation (Hendrycks & Gimpel 2016, arXiv 1606.08415)."""
    if not torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    # The same function, since (1 + tanh u) / 2 = sigmoid(2u); compiled for CPUs it takes half the time.
    return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))


class MLP(nn.Module):
    """Two linear layers with a tanh-GELU between them."""

    def __init__(self, width: int, hidden: int, dropout: float):
        super().__init__()
        self.fc_in = nn.Linear(width, hidden)
        self.fc_out = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(gelu_tanh(self.fc_in(x)))
        return self.dropout(self.fc_out(x))


class AdaLNZeroBlock(nn.Module):
    """Attention and MLP, each with shift, scale and gate regressed from the conditioning.

    ``modulation`` starts at zero, so that the gates are closed and the block begins as the identity.
    """

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, dropout: float):
        super().__init__()
        self.norm1 = layer_norm(width)
        self.attn = Attention(width, num_heads, dropout)
        self.norm2 = layer_norm(width)
        self.mlp = MLP(width, int(width * mlp_ratio), dropout)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (N, T, D) tokens; c (N, D) conditioning, already through its SiLU."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).chunk(6, dim=1)  # 6 x (N, D)
        x = gated(x, gate1, self.attn(modulate(self.norm1(x), shift1, scale1)))
        return gated(x, gate2, self.mlp(modulate(self.norm2(x), shift2, scale2)))


class FinalLayer(nn.Module):
    """Modulated norm and a linear map to the values of each patch."""

    def __init__(self, width: int, out_features: int):
        super().__init__()
        self.norm = layer_norm(width)
        self.modulation = nn.Linear(width, 2 * width)
        self.linear = nn.Linear(width, out_features)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.modulation(c).chunk(2, dim=1)  # 2 x (N, D)
        return self.linear(modulate(self.norm(x), shift, scale))  # (N, T, p*p*C)
