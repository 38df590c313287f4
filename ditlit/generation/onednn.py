"""Linear layers for inference on a CPU, where PyTorch's own lose time: oneDNN with the activation inside the product.

In 16 bits PyTorch first copies the bias over the output, and its tanh-GELU takes three times as long as the product
before it. oneDNN adds the bias and applies the GELU while a tile of the product is in cache. These are the operators
that torch.compile uses on CPUs; they have no backward pass, so training keeps the plain layers.
"""

import torch
from torch import Tensor, nn

from ditlit.models.blocks import MLP
from ditlit.models.conditioning import DESIGNS


class FusedLinear(nn.Module):
    """A linear layer, with a tanh-GELU behind it where ``gelu`` says so.

    Args:
        linear: the layer, whose weights it shares.
        gelu: whether the activation follows.
    """

    def __init__(self, linear: nn.Linear, gelu: bool = False):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.activation = ("gelu", [], "tanh") if gelu else ("none", [], "")

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, *self.activation)


class FusedMLP(nn.Module):
    """An :class:`MLP` in two operators."""

    def __init__(self, mlp: MLP):
        super().__init__()
        self.fc_in = FusedLinear(mlp.fc_in, gelu=True)
        self.fc_out = FusedLinear(mlp.fc_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc_out(self.fc_in(x))


def supported(dtype: torch.dtype) -> bool:
    """Whether oneDNN has products in this precision for this CPU: bfloat16 needs AVX-512 or the like."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def fuse(denoiser: nn.Module) -> None:
    """Replace the layers of a DiT's blocks, in place, where oneDNN supports their precision; for inference only."""
    if not supported(next(denoiser.parameters()).dtype):
        return
    for block in denoiser.modules():
        if isinstance(block, tuple(design.block for design in DESIGNS.values())):
            block.attn.qkv, block.attn.out = FusedLinear(block.attn.qkv), FusedLinear(block.attn.out)
            block.mlp = FusedMLP(block.mlp)
