"""Mean and covariance of features in float64, summed over batches."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

CHUNK = 1024  # rows summed at once: fixed, so that the result depends on nothing but the rows


@dataclass
class Statistics:
    """Mean (D,) and covariance (D, D) of a set of features, in float64.

    Args:
        mean: (D,).
        cov: (D, D), divided by n - 1 as numpy's.
        n: number of samples; 0 where unknown.
    """

    mean: Tensor
    cov: Tensor
    n: int = 0

    @cached_property
    def root(self) -> Tensor:
        """A factor R (D, r) of the covariance, R R^T = cov, with one column for each direction that has variance.

        Rounding gives the directions without variance eigenvalues of about 1e-16 of the largest, whose square roots
        are no longer small: they are left out. Covariances of fewer samples than dimensions have many of them.
        """
        values, vectors = torch.linalg.eigh(self.cov)  # (D,), (D, D)
        keep = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
        return vectors[:, keep] * values[keep].sqrt()  # (D, r)


class Sums:
    """Streams features into :class:`Statistics`: memory of D x D, whatever the number of samples.

    Sums are taken around the mean of the first rows: without that, squares of features far from zero would cancel.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = device
        self.n = 0
        self.center: Tensor | None = None

    def add(self, features: Tensor) -> None:
        """Features (N, D) of any floating-point type."""
        x = features.to(self.device, torch.float64)
        if self.center is None:
            self.center = x.mean(0)
            self.first = torch.zeros_like(self.center)  # (D,)
            self.second = x.new_zeros(x.shape[1], x.shape[1])  # (D, D)
        x = x - self.center
        self.n += len(x)
        self.first += x.sum(0)
        self.second.addmm_(x.T, x)

    def statistics(self) -> Statistics:
        mean = self.first / self.n
        cov = (self.second - self.n * torch.outer(mean, mean)) / max(self.n - 1, 1)
        return Statistics(self.center + mean, (cov + cov.T) / 2, self.n)


def statistics_of(features: Tensor, device: torch.device | str = "cpu") -> Statistics:
    """Statistics of features (N, D), which may be mapped from a disk."""
    n, dimension = features.shape
    if n > dimension:
        sums = Sums(device)
        for batch in features.split(CHUNK):
            sums.add(batch)
        return sums.statistics()
    x = features.to(device, torch.float64)
    mean = x.mean(0)
    factor = (x - mean).T / max(n - 1, 1) ** 0.5  # (D, N)
    statistics = Statistics(mean, factor @ factor.T, n)
    statistics.root = factor  # no need to take the covariance apart again
    return statistics
