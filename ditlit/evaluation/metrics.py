"""The metrics of generated images, from features of theirs and of real images, in float64."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ditlit.evaluation.statistics import Statistics

INCEPTION_SPLIT = 5000  # images of one Inception Score, as the ADM evaluator cuts them
NEIGHBOURS = 3
KERNEL_SUBSETS, KERNEL_SUBSET_SIZE, KERNEL_SEED = 100, 1000, 2020  # torch-fidelity's


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Squared Fréchet distance of two Gaussians: |m_a - m_b|^2 + tr(A + B - 2 (A B)^(1/2)) (Heusel et al. 2017, eq. 6).

    With A = R R^T and B = S S^T, the trace of (A B)^(1/2) is the sum of the singular values of R^T S. Unlike the
    square root of a matrix product that stays exact where the covariances are singular.
    """
    shared = torch.linalg.svdvals(a.root.T @ b.root).sum()
    difference = (a.mean - b.mean).square().sum()
    return max(0.0, float(difference + a.cov.trace() + b.cov.trace() - 2 * shared))  # rounding may pass below 0


def inception_score(logits: Tensor, split_size: int = INCEPTION_SPLIT) -> tuple[float, float]:
    """exp E KL(p(y|x) || p(y)) (Salimans et al. 2016): mean and standard deviation over splits of logits (N, K).

    The ADM evaluator takes splits of 5,000 consecutive images and logits without the bias of the last layer.
    """
    scores = [score_of(part) for part in logits.split(split_size)]
    return float(np.mean(scores)), float(np.std(scores))


def score_of(logits: Tensor) -> float:
    log_p = logits.double().log_softmax(1)  # (N, K)
    p = log_p.exp()
    marginal = p.mean(0)  # (K,)
    entropy = torch.special.entr(marginal).sum()
    return float(((p * log_p).sum(1).mean() + entropy).exp())


class PrecisionRecall(NamedTuple):
    """Whether each generated image (N,) lies in the real manifold, and each real image (M,) in the generated one."""

    precise: Tensor
    recalled: Tensor

    @property
    def precision(self) -> float:
        return self.precise.double().mean().item()

    @property
    def recall(self) -> float:
        return self.recalled.double().mean().item()


def precision_recall(
    generated: Tensor, real: Tensor, k: int = NEIGHBOURS, rows: int = 2048, device: torch.device | str = "cpu"
) -> PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi et al. 2019) of features (N, D) and (M, D).

    A manifold is the union of balls around its samples that reach to the k-th nearest other sample.

    Args:
        generated, real: features of any floating-point type, possibly mapped from a disk.
        k: neighbours; the paper's and ADM's is 3.
        rows: samples whose distances are held at once, to as many others: memory of rows x rows and rows x D.
        device: to compute on.
    """
    radii = [radii_of(features, k, rows, device) for features in (generated, real)]
    return PrecisionRecall(
        inside(generated, real, radii[1], rows, device), inside(real, generated, radii[0], rows, device)
    )


def radii_of(features: Tensor, k: int, rows: int, device: torch.device | str) -> Tensor:
    """Squared distance (N,) from each sample to its k-th nearest other one."""
    radii = []
    for part in features.split(rows):
        nearest: Tensor | None = None  # (n, k + 1): the sample itself is its own nearest
        for others in features.split(rows):
            distances = squared_distances(part, others, device)
            candidates = distances if nearest is None else torch.cat([nearest, distances], 1)
            nearest = candidates.topk(min(k + 1, candidates.shape[1]), largest=False).values
        radii.append(nearest[:, -1])
    return torch.cat(radii)


def inside(points: Tensor, centers: Tensor, radii: Tensor, rows: int, device: torch.device | str) -> Tensor:
    """Whether each point (N,) lies in any of the balls with these centers (M, D) and squared radii (M,)."""
    found = []
    for part in points.split(rows):
        any_ball = torch.zeros(len(part), dtype=torch.bool, device=device)
        for others, squares in zip(centers.split(rows), radii.split(rows), strict=True):
            any_ball |= (squared_distances(part, others, device) <= squares).any(1)
        found.append(any_ball.cpu())
    return torch.cat(found)


def squared_distances(a: Tensor, b: Tensor, device: torch.device | str) -> Tensor:
    """(n, m) squared distances of a (n, D) and b (m, D), in float64: in float32 near ones would cancel."""
    a, b = a.to(device).to(torch.float64), b.to(device).to(torch.float64)  # on the device, which is faster at it
    squares = torch.addmm(b.square().sum(1), a, b.T, alpha=-2)
    return (squares + a.square().sum(1, keepdim=True)).clamp(min=0)


def kernel_distance(
    generated: Tensor,
    real: Tensor,
    subsets: int = KERNEL_SUBSETS,
    subset_size: int = KERNEL_SUBSET_SIZE,
    seed: int = KERNEL_SEED,
    device: torch.device | str = "cpu",
) -> np.ndarray:
    """Squared maximum mean discrepancy under the kernel (x.y / D + 1)^3 (Bińkowski et al. 2018): KID.

    Subsets are those that torch-fidelity draws with the same seed; where there are fewer images than ``subset_size``
    all of them are taken.

    Returns:
        Unbiased estimates (subsets,), one of each pair of subsets, or a single one where all images are in every
        subset. Their mean is the KID.
    """
    size = min(subset_size, len(generated), len(real))
    subsets = 1 if size == len(generated) == len(real) else subsets
    rng = np.random.RandomState(seed)
    estimates = []
    for _ in range(subsets):
        x, y = (
            features[rng.choice(len(features), size, replace=False)].to(device, torch.float64)
            for features in (generated, real)
        )
        within = sum((kernel(z, z).sum() - kernel_diagonal(z).sum()) / (size * (size - 1)) for z in (x, y))
        estimates.append(float(within - 2 * kernel(x, y).mean()))
    return np.array(estimates)


def kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3  # (n, m)


def kernel_diagonal(x: Tensor) -> Tensor:
    return (x.square().sum(1) / x.shape[1] + 1) ** 3  # (n,)
