"""Looking inside a denoiser while it runs: hooks that read and change nothing."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from ditlit.errors import InputError

MOST_LOGITS = 2**26  # held at once: a quarter of a gigabyte


def blocks_of(denoiser: nn.Module) -> Sequence[nn.Module]:
    """The transformer blocks of a denoiser.

    Raises:
        InputError: for a denoiser that has none.
    """
    blocks = getattr(denoiser, "blocks", None)
    if blocks is None:
        raise InputError(f"only transformers with blocks can be looked into, and {type(denoiser).__name__} has none")
    return blocks


@contextmanager
def watch(
    denoiser: nn.Module, modules: Sequence[nn.Module], see: Callable[[int, Tensor, Tensor], None]
) -> Iterator[None]:
    """Inside, each of these modules of a denoiser calls ``see``: its number here, its first argument, its output.

    What is compiled runs uncompiled meanwhile: it does not know of the hooks.
    """

    def hook_of(number: int) -> Callable:
        return lambda module, args, output: see(number, args[0].detach(), output.detach())

    compiled = any(part._compiled_call_impl is not None for part in denoiser.modules())
    handles = [module.register_forward_hook(hook_of(number)) for number, module in enumerate(modules)]
    try:
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            yield
    finally:
        for handle in handles:
            handle.remove()


def watch_blocks(denoiser: nn.Module, see: Callable[[int, Tensor, Tensor], None]):
    """Inside, every block calls ``see`` with its number and the tokens (N, T, D) before and after it."""
    return watch(denoiser, blocks_of(denoiser), see)


def watch_attention(denoiser: nn.Module, see: Callable[[int, Tensor, Tensor, Tensor], None]):
    """Inside, the self-attention of every block calls ``see`` with the block's number, q, k and v.

    Each is (N, heads, T, d), in the precision of the pass.
    """
    attentions = [block.attn for block in blocks_of(denoiser)]

    def split(number: int, _: Tensor, qkv: Tensor) -> None:
        n, tokens, width = qkv.shape
        heads = attentions[number].num_heads
        parts = qkv.reshape(n, tokens, 3, heads, width // 3 // heads).permute(2, 0, 3, 1, 4)  # 3 x (N, heads, T, d)
        see(number, *parts)

    return watch(denoiser, [attention.qkv for attention in attentions], split)


def attention_logits(q: Tensor, k: Tensor) -> Tensor:
    """q k^T / sqrt(d) of queries and keys (N, heads, T, d), in float32: what the softmax sees, (N, heads, T, T)."""
    return (q.float() * q.shape[-1] ** -0.5) @ k.float().transpose(-2, -1)


def largest_logit(q: Tensor, k: Tensor) -> Tensor:
    """The largest of :func:`attention_logits` of each sample, (N,), with part of them in memory at a time."""
    _, heads, tokens, _ = q.shape
    rows = max(1, MOST_LOGITS // (heads * tokens * k.shape[2]))
    parts = zip(q.split(rows), k.split(rows), strict=True)
    return torch.cat([attention_logits(*part).amax((1, 2, 3)) for part in parts])
