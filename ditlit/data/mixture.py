"""Which samples an epoch has, and how often, where that is not each of them once."""

from collections.abc import Sequence
from math import isfinite

import torch
from torch import Tensor

from ditlit.errors import InputError


class Mixture:
    """Groups of samples, and how many samples of each an epoch has.

    A group that is to give more samples than it holds repeats evenly: all of it as often as that goes in whole, and a
    fresh random choice for the rest.

    Args:
        groups: rows of the samples of each group, (n_g,) and not empty.
        quotas: samples of each group in an epoch.
    """

    def __init__(self, groups: Sequence[Tensor], quotas: Sequence[int]):
        self.groups = groups
        self.quotas = quotas
        self.num_samples = sum(quotas)

    def draw(self, generator: torch.Generator) -> Tensor:
        """Rows (num_samples,) of one epoch, group after group."""
        rows = []
        for group, quota in zip(self.groups, self.quotas, strict=True):
            copies, rest = divmod(quota, len(group))
            rows += [group] * copies
            rows.append(group[torch.randperm(len(group), generator=generator)[:rest]])
        return torch.cat(rows)


def make_mixture(
    store_of: Tensor, weights: Sequence[float] | None, labels: Tensor | None = None, num_classes: int = 0
) -> Mixture:
    """Stores by weight, classes equally often, or both: the weights then hold within each class.

    Args:
        store_of: number (n,) of the store of each sample.
        weights: of the stores, which need not add up to one; None for as many samples of each as it has.
        labels: (n,) to balance the classes; None to leave them as they are.
        num_classes: that the labels have.

    Raises:
        InputError: for weights that are not positive, or a store or class without samples.
    """
    weights = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    if weights is not None and not all(w > 0 and isfinite(w) for w in weights.tolist()):
        raise InputError(f"the weights of stores must be positive numbers, got {weights.tolist()}")
    num_stores = int(store_of.max()) + 1 if weights is None else len(weights)
    if labels is None:
        labels, num_classes = torch.zeros_like(store_of), 1
    counts = torch.bincount(labels * num_stores + store_of, minlength=num_classes * num_stores)
    counts = counts.view(num_classes, num_stores)
    if missing := (counts.sum(1) == 0).nonzero().flatten().tolist():
        raise InputError(f"class_balanced needs samples of every class, but there are none of {missing[:10]}")
    if weights is not None and (missing := (counts.sum(0) == 0).nonzero().flatten().tolist()):
        raise InputError(f"a store with a weight needs samples to train on, but store number {missing[0]} has none")
    groups = (labels * num_stores + store_of).argsort(stable=True).split(counts.flatten().tolist())
    kept, quotas = [], []
    for k in range(num_classes):
        shares = counts[k].double() if weights is None else weights * (counts[k] > 0)
        for s, quota in enumerate(split_evenly(len(labels) // num_classes, shares.tolist())):
            if quota:
                kept.append(groups[k * num_stores + s])
                quotas.append(quota)
    return Mixture(kept, quotas)


def split_evenly(total: int, shares: Sequence[float]) -> list[int]:
    """Whole numbers in proportion to shares that add up to the total: rounded down, the largest remainders up."""
    exact = [total * share / sum(shares) for share in shares]
    parts = [int(x) for x in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: parts[i] - exact[i])
    for i in by_remainder[: total - sum(parts)]:
        parts[i] += 1
    return parts
