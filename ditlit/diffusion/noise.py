"""Normal noise from generators that belong to samples, so that no sample depends on its batch, device or rank."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ditlit.diffusion.process import Generators


def randn_like(x: Tensor, generator: Generators) -> Tensor:
    """Normal noise shaped like x, from one generator or from one for each sample (on whatever device they live)."""
    if generator is None:
        return torch.randn_like(x)
    if isinstance(generator, torch.Generator):
        return torch.randn(x.shape, generator=generator, device=generator.device, dtype=torch.float32).to(x)
    return normal(x.shape[1:], generator).to(x)


def normal(shape: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
    """Float32 normal noise (N, *shape), each row from its own generator."""
    return torch.stack(
        [torch.randn(tuple(shape), generator=g, device=g.device, dtype=torch.float32) for g in generators]
    )


def sample_generators(seed: int, indices: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator for each global sample index, so that a sample is the same in any batch, on any rank.

    Seeds are mixed as in splitmix64, so that neighbouring (seed, index) pairs have unrelated streams.
    """
    return [torch.Generator().manual_seed(mix(seed, int(index))) for index in indices]


def mix(*numbers: int) -> int:
    """A 63-bit seed from integers: splitmix64 (Steele et al. 2014) folded over them."""
    mask = (1 << 64) - 1
    state = 0
    for number in numbers:
        state = ((state ^ (number & mask)) + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return state >> 1
