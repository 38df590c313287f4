"""How far a number can be trusted: its growth with fewer images, and its spread over resampled images."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ditlit.evaluation.metrics import frechet_distance, inception_score
from ditlit.evaluation.statistics import Statistics, statistics_of

LEVEL = 0.95  # of the intervals


def distances_by_size(
    features: Tensor, real: Statistics, sizes: list[int], seed: int = 0, device: torch.device | str = "cpu"
) -> dict[int, float]:
    """Fréchet distance of random subsets of generated features (N, D), by their size."""
    rng = np.random.default_rng(seed)
    found = {}
    for size in sizes:
        rows = np.sort(rng.choice(len(features), size, replace=False))
        found[size] = frechet_distance(statistics_of(features[rows], device), real)
    return found


def extrapolated(distances: dict[int, float]) -> float:
    """The distance of infinitely many images: the bias falls as 1/N, so a line through the distances over 1/N is
    followed to 0 (Chong & Forsyth 2020, arXiv 1911.07023).
    """
    sizes = np.array(list(distances), float)
    _, intercept = np.polyfit(1 / sizes, np.array(list(distances.values())), 1)
    return float(intercept)


def default_sizes(n: int, count: int = 8) -> list[int]:
    """Sizes from n / 10 to n, evenly spaced as in the paper."""
    return np.unique(np.linspace(n / 10, n, count).round().astype(int)).tolist()


def bootstrap(
    value: float, n: int, statistic: Callable[[np.ndarray], float], repeats: int, seed: int = 0
) -> list[float]:
    """An interval around a value that holds 95 % of its spread over resampled images.

    A resample repeats images, which raises distances as having fewer images does. So the resampled values' spread
    around their own mean is laid around the value.

    Args:
        value: of the metric.
        n: number of images.
        statistic: the metric of the images at these positions (n,).
        repeats: resamples.
        seed: of the resampling.

    Returns:
        Lower and upper end.
    """
    rng = np.random.default_rng(seed)
    values = np.array([statistic(np.sort(rng.integers(n, size=n))) for _ in range(repeats)])
    low, high = np.quantile(values - values.mean(), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return [float(value + low), float(value + high)]


def distance_interval(
    value: float, features: Tensor, real: Statistics, repeats: int, device: torch.device | str = "cpu"
) -> list[float]:
    """Of a Fréchet distance, over resampled generated features (N, D)."""
    return bootstrap(
        value, len(features), lambda rows: frechet_distance(statistics_of(features[rows], device), real), repeats
    )


def score_interval(value: float, logits: Tensor, repeats: int) -> list[float]:
    """Of an Inception Score, over resampled logits (N, K). Their order is kept random, since it makes the splits."""
    shuffle = torch.randperm(len(logits), generator=torch.Generator().manual_seed(0))
    return bootstrap(value, len(logits), lambda rows: inception_score(logits[shuffle[rows]])[0], repeats)


def mean_interval(values: np.ndarray, repeats: int) -> list[float]:
    """Of a mean over values (n,), such as the share of images inside a manifold."""
    values = values.astype(float)
    return bootstrap(float(values.mean()), len(values), lambda rows: float(values[rows].mean()), repeats)
