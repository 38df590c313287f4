"""The Diffusion Transformer of Peebles & Xie, "Scalable Diffusion Models with Transformers" (arXiv 2212.09748)."""

from bisect import bisect
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ditlit.errors import InputError, check_positive
from ditlit.models.blocks import AdaLNZeroBlock, FinalLayer
from ditlit.models.conditioning import DESIGNS
from ditlit.models.embeddings import TimestepEmbedding, patchify, sincos_positions, unpatchify

# The paper's table 1; every size comes with patch sizes 8, 4 and 2.
SIZES = {
    "S": dict(depth=12, hidden_size=384, num_heads=6),
    "B": dict(depth=12, hidden_size=768, num_heads=12),
    "L": dict(depth=24, hidden_size=1024, num_heads=16),
    "XL": dict(depth=28, hidden_size=1152, num_heads=16),
}
VARIANTS = {f"DiT-{s}/{p}": dict(**sizes, patch_size=p) for s, sizes in SIZES.items() for p in (8, 4, 2)}


class DiT(nn.Module):
    """A class-conditional denoiser: ``model(x_t, t, y)``.

    A pure function of its arguments: nothing is dropped or drawn inside unless ``dropout`` > 0 in training mode.
    Label K = ``num_classes`` is the null class of classifier-free guidance.

    Args:
        variant: a row of the paper's size table, DiT-S/8 to DiT-XL/2.
        input_size: height and width of the latents; one number for a square.
        in_channels: channels C of the latents.
        num_classes: number K of classes; labels run from 0 to K-1, and K is the null class.
        depth: number of blocks, instead of the variant's.
        hidden_size: width D of the tokens, instead of the variant's.
        num_heads: attention heads, instead of the variant's.
        patch_size: side p of a patch, instead of the variant's.
        mlp_ratio: hidden width of each MLP as a multiple of D.
        learn_sigma: predict the variance too: 2C output channels, noise first.
        positions: fixed 2-D sines and cosines (the paper) or a learned table.
        dropout: of attention weights and MLP activations, in training mode. The paper uses none.
        gradient_checkpointing: recompute blocks in the backward pass instead of storing their activations: all of
            them, or so many, spread evenly over the depth.
        conditioning: how blocks know timestep and class, the paper's four designs: as two tokens in context, through
            cross-attention, or through norms whose shift and scale depend on them, without or with gates.

    Raises:
        InputError: for an unknown variant or sizes that do not fit together.
    """

    def __init__(
        self,
        variant: str = "DiT-XL/2",
        input_size: int | tuple[int, int] = 32,
        in_channels: int = 4,
        num_classes: int = 1000,
        depth: int | None = None,
        hidden_size: int | None = None,
        num_heads: int | None = None,
        patch_size: int | None = None,
        mlp_ratio: float = 4.0,
        learn_sigma: bool = True,
        positions: Literal["sincos", "learned"] = "sincos",
        dropout: float = 0.0,
        gradient_checkpointing: bool | int = False,
        conditioning: Literal["in_context", "cross_attention", "adaln", "adaln_zero"] = "adaln_zero",
    ):
        super().__init__()
        if variant not in VARIANTS:
            raise InputError(f"unknown DiT variant {variant!r}; choose one of {', '.join(VARIANTS)}")
        given = dict(depth=depth, hidden_size=hidden_size, num_heads=num_heads, patch_size=patch_size)
        sizes = VARIANTS[variant] | {name: value for name, value in given.items() if value is not None}
        self.config = dict(
            variant=variant,
            input_size=input_size if isinstance(input_size, int) else list(input_size),
            in_channels=in_channels,
            num_classes=num_classes,
            **sizes,
            mlp_ratio=mlp_ratio,
            learn_sigma=learn_sigma,
            positions=positions,
            dropout=dropout,
            gradient_checkpointing=gradient_checkpointing,
            conditioning=conditioning,
        )
        self.input_size = (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)
        self.in_channels = in_channels
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        self.num_classes = num_classes
        self.patch_size, width = sizes["patch_size"], sizes["hidden_size"]
        self.conditioning = conditioning
        check_positive(in_channels=in_channels, num_classes=num_classes, **sizes)
        check_sizes(self.input_size, width, sizes["num_heads"], self.patch_size)
        if conditioning not in DESIGNS:
            raise InputError(f"unknown conditioning {conditioning!r}; choose one of {', '.join(DESIGNS)}")
        self.recomputed = recomputed(gradient_checkpointing, sizes["depth"])

        self.grid = (self.input_size[0] // self.patch_size, self.input_size[1] // self.patch_size)
        tokens = self.grid[0] * self.grid[1]
        self.patch_embed = nn.Linear(in_channels * self.patch_size**2, width)
        if positions == "sincos":
            self.register_buffer("pos_embed", sincos_positions(width, self.grid), persistent=False)
        else:
            self.pos_embed = nn.Parameter(torch.empty(tokens, width))
        self.time_embed = TimestepEmbedding(width)
        self.label_embed = nn.Embedding(num_classes + 1, width)
        Block, Final, self.enter = DESIGNS[conditioning]
        self.blocks = nn.ModuleList(Block(width, sizes["num_heads"], mlp_ratio, dropout) for _ in range(sizes["depth"]))
        self.final = Final(width, self.patch_size**2 * self.out_channels)
        self.initialize()

    def initialize(self) -> None:
        """The paper's initialisation: adaLN-Zero's blocks start as the identity, and every design's output as zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.label_embed.weight, std=0.02)
        nn.init.normal_(self.time_embed.mlp[0].weight, std=0.02)
        nn.init.normal_(self.time_embed.mlp[2].weight, std=0.02)
        if isinstance(self.pos_embed, nn.Parameter):
            nn.init.normal_(self.pos_embed, std=0.02)
        silent = [self.final.linear]
        silent += [module.modulation for module in self.modules() if isinstance(module, (AdaLNZeroBlock, FinalLayer))]
        for layer in silent:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """x_t (N, C, H, W) noisy latents, t (N,) timesteps, y (N,) labels in 0..K -> (N, C or 2C, H, W)."""
        if x_t.shape[1:] != (self.in_channels, *self.input_size):
            expected = (self.in_channels, *self.input_size)
            raise InputError(f"this DiT is built for latents of shape {expected}, got {tuple(x_t.shape[1:])}")
        x = patchify(x_t, self.patch_size).to(self.patch_embed.weight.dtype)  # (N, T, C*p*p)
        x = self.patch_embed(x) + self.pos_embed  # (N, T, D)
        tokens = x.shape[1]
        x, c = self.enter(x, self.time_embed(t), self.label_embed(y))  # in context (N, T+2, D)
        for number, block in enumerate(self.blocks):
            if number in self.recomputed and torch.is_grad_enabled():
                x = checkpoint(block, x, c, use_reentrant=False)  # (N, T, D)
            else:
                x = block(x, c)  # (N, T, D)
        x = self.final(x[:, :tokens], c)  # (N, T, p*p*C_out)
        return unpatchify(x, self.patch_size, self.grid)  # (N, C_out, H, W)


def recomputed(blocks: bool | int, depth: int) -> frozenset[int]:
    """Numbers of the blocks that are recomputed in the backward pass."""
    if blocks is True:
        return frozenset(range(depth))
    if not 0 <= blocks <= depth:
        raise InputError(f"gradient_checkpointing recomputes between 0 and all {depth} blocks, got {blocks}")
    return frozenset(i for i in range(depth) if (i + 1) * blocks // depth > i * blocks // depth)


def check_sizes(input_size: tuple[int, int], width: int, num_heads: int, patch_size: int) -> None:
    if any(size < 1 or size % patch_size for size in input_size):
        raise InputError(f"latents of {input_size[0]}x{input_size[1]} cannot be cut into patches of {patch_size}")
    if width % num_heads:
        divisors = [n for n in range(1, width + 1) if width % n == 0]
        at = bisect(divisors, num_heads)
        near = " and ".join(map(str, divisors[at - 1 : at + 1]))
        raise InputError(f"hidden_size {width} is not divisible by num_heads {num_heads}, but by {near}")
    if width % 4:
        raise InputError(f"hidden_size {width} must be divisible by 4 for the 2-D position table")


def num_parameters(model: DiT) -> int:
    """Number of parameters as the released code counts them: with the fixed position table.

    The paper's numbers in millions are the same without it, and its 600 M of adaLN only without it.
    """
    frozen = 0 if isinstance(model.pos_embed, nn.Parameter) else model.pos_embed.numel()
    return sum(p.numel() for p in model.parameters()) + frozen


def macs(model: DiT) -> int:
    """Multiply-adds of one forward pass of one sample: what the paper's tables call "flops" (FLOPs are twice this).

    A linear layer costs its weights once a token, or once a sample where its input is the conditioning. Attention costs
    T*T*D for the scores and as much again for the values. A norm costs one for each value it normalises: without that
    DiT-XL/2 would be 118.62 G and not the paper's 118.64. Activations, additions and modulation are not counted. This
    gives table 4 of the paper to two decimals, but for DiT-B/4: 5.566 G here, 5.56 there. It also gives all four
    designs of conditioning to two decimals.
    """
    tokens, width = model.grid[0] * model.grid[1], model.config["hidden_size"]
    inside = tokens + 2 if model.conditioning == "in_context" else tokens  # tokens in a block
    total = len(model.blocks) * 2 * inside * inside * width
    if model.conditioning == "cross_attention":
        total += len(model.blocks) * 2 * tokens * 2 * width
    for name, layer in model.named_modules():
        times = inside if name.startswith("blocks") else tokens
        if isinstance(layer, nn.Linear):
            if name.endswith("modulation") or name.startswith("time_embed"):
                times = 1
            elif name.endswith("cross.kv"):
                times = 2
            total += layer.weight.numel() * times
        elif isinstance(layer, nn.LayerNorm):
            total += times * width
    return total
