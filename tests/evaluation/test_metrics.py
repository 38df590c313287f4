"""Metrics against independent computations of the same formulas."""

import warnings

import numpy as np
import pytest
import scipy.linalg
import torch

from ditlit.evaluation import Statistics, frechet_distance, inception_score, kernel_distance, precision_recall
from ditlit.evaluation.confidence import bootstrap, default_sizes, distances_by_size, extrapolated, mean_interval
from ditlit.evaluation.statistics import Sums, statistics_of


def features(n, dimension, seed, scale=1.0, shift=0.0):
    """Correlated features with a decaying spectrum, as networks have them."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dimension, dimension, generator=torch.Generator().manual_seed(7)) / dimension**0.5
    x = torch.randn(n, dimension, generator=generator) * torch.linspace(1, 0.05, dimension)
    return scale * (x @ mix) + shift


def scipy_distance(x, y):
    """The formula as every reference implementation writes it, in float64."""
    x, y = x.double().numpy(), y.double().numpy()
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of singular matrices
        root = scipy.linalg.sqrtm(a @ b)
    return np.square(x.mean(0) - y.mean(0)).sum() + np.trace(a) + np.trace(b) - 2 * np.trace(root).real


@pytest.mark.parametrize("n", [2000, 40], ids=["more images than dimensions", "fewer images than dimensions"])
def test_the_frechet_distance_is_that_of_scipy(n):
    x, y = features(n, 64, 0), features(n + 5, 64, 1, scale=1.3, shift=0.2)
    assert frechet_distance(statistics_of(x), statistics_of(y)) == pytest.approx(scipy_distance(x, y), rel=1e-6)


def test_the_frechet_distance_of_singular_covariances_is_that_of_scipy():
    x, y = features(500, 32, 0), features(500, 32, 1, scale=1.5, shift=1)
    x[:, 20:], y[:, 28:] = 0.5, 0  # constant features, other ones on both sides
    y[:, 0] = y[:, 1]  # and one that repeats another
    assert frechet_distance(statistics_of(x), statistics_of(y)) == pytest.approx(scipy_distance(x, y), rel=1e-6)


def test_the_frechet_distance_of_disjoint_supports_has_a_closed_form():
    a = Statistics(torch.zeros(2).double(), torch.diag(torch.tensor([4.0, 0.0]).double()))
    b = Statistics(torch.tensor([3.0, 0.0]).double(), torch.diag(torch.tensor([0.0, 9.0]).double()))
    assert frechet_distance(a, b) == pytest.approx(9 + 4 + 9, rel=1e-12)
    c = Statistics(b.mean, torch.diag(torch.tensor([1.0, 9.0]).double()))
    assert frechet_distance(a, c) == pytest.approx(9 + (2 - 1) ** 2 + 9, rel=1e-12)  # axis by axis


@pytest.mark.parametrize("n", [300, 30])
def test_the_distance_of_a_set_to_itself_is_zero(n):
    a = statistics_of(features(n, 64, 0, scale=10, shift=5))
    assert frechet_distance(a, a) < 1e-6
    assert frechet_distance(a, statistics_of(features(n, 64, 0, scale=10, shift=5))) < 1e-6


def test_constant_features_are_at_the_distance_of_their_means():
    a, b = statistics_of(torch.zeros(5, 3)), statistics_of(torch.ones(5, 3))
    assert frechet_distance(a, b) == pytest.approx(3)


def test_streamed_statistics_are_those_of_numpy_also_far_from_zero():
    x = features(5000, 16, 0, shift=1e4).double()
    sums = Sums()
    for part in x.split(333):
        sums.add(part)
    streamed = sums.statistics()
    np.testing.assert_allclose(streamed.mean, x.numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(streamed.cov, np.cov(x.numpy(), rowvar=False), rtol=1e-8, atol=1e-9)
    assert streamed.n == 5000


def test_the_inception_score_is_its_formula():
    logits = 3 * torch.randn(70, 10, generator=torch.Generator().manual_seed(0))
    p = torch.softmax(logits.double(), 1).numpy()
    scores = []
    for part in (p[:30], p[30:60], p[60:]):  # the last split is shorter, as in the ADM evaluator
        scores.append(np.exp((part * (np.log(part) - np.log(part.mean(0)))).sum(1).mean()))
    mean, std = inception_score(logits, 30)
    assert mean == pytest.approx(np.mean(scores), rel=1e-12) and std == pytest.approx(np.std(scores), rel=1e-9)


def test_the_inception_score_of_sure_and_varied_images_is_the_number_of_classes():
    assert inception_score(1000 * torch.eye(10).repeat(3, 1))[0] == pytest.approx(10)
    assert inception_score(torch.zeros(30, 10))[0] == pytest.approx(1)


def brute_force(generated, real, k):
    def share(points, centers):
        count = 0
        for point in points:
            for center in centers:
                radius = sorted(np.linalg.norm(center - other) for other in centers)[k]  # 0 is the center itself
                if np.linalg.norm(point - center) <= radius:
                    count += 1
                    break
        return count / len(points)

    generated, real = generated.double().numpy(), real.double().numpy()
    return share(generated, real), share(real, generated)


@pytest.mark.parametrize("rows", [1000, 17], ids=["in one piece", "in slices"])
def test_precision_and_recall_are_those_of_brute_force(rows):
    generated, real = features(60, 8, 0, shift=0.4), features(50, 8, 1)
    found = precision_recall(generated, real, rows=rows)
    assert (found.precision, found.recall) == pytest.approx(brute_force(generated, real, 3))
    assert 0.05 < found.precision < 0.95 and 0.05 < found.recall < 0.95  # or this would prove little


def test_precision_sees_bad_images_and_recall_missing_ones():
    real = features(200, 4, 0)
    bad = torch.cat([real[:100], real[100:] + 100])
    assert precision_recall(bad, real).precision == 0.5
    missing = real.clone()
    missing[100:] = real[:100]
    assert precision_recall(missing, real + 1e-9).precision == 1 > precision_recall(missing, real).recall


def test_the_kernel_distance_is_torch_fidelitys():
    metric = pytest.importorskip("torch_fidelity.metric_kid")
    x, y = features(300, 32, 0), features(250, 32, 1, scale=1.2)
    theirs = metric.kid_features_to_metric(
        x.double(), y.double(), kid_subsets=20, kid_subset_size=100, rng_seed=2020, verbose=False
    )
    ours = kernel_distance(x, y, subsets=20, subset_size=100)
    assert ours.mean() == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)
    assert ours.std() == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-9)


def test_distances_grow_with_fewer_images_and_extrapolate_to_the_true_one():
    real = Statistics(torch.zeros(64).double(), torch.eye(64).double())
    x = torch.randn(4000, 64, generator=torch.Generator().manual_seed(0)) + 0.1  # at distance 64 * 0.01
    found = distances_by_size(x, real, default_sizes(4000))
    assert list(found) == default_sizes(4000) and found[4000] == frechet_distance(statistics_of(x), real)
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert abs(found[4000] - 0.64) > 0.2 > 0.1 > abs(extrapolated(found) - 0.64)
    assert extrapolated({100: 3 + 7 / 100, 200: 3 + 7 / 200, 400: 3 + 7 / 400}) == pytest.approx(3)


def test_bootstrap_intervals_cover_a_mean_as_often_as_they_say():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        values = rng.normal(size=50)
        low, high = mean_interval(values, 200)
        hits += low <= 0 <= high
    assert 0.88 < hits / 200 < 0.99


def test_bootstrap_intervals_lie_around_the_value_although_resamples_repeat_images():
    x = features(100, 8, 0)
    real = statistics_of(features(2000, 8, 1))
    value = frechet_distance(statistics_of(x), real)
    low, high = bootstrap(value, 100, lambda rows: frechet_distance(statistics_of(x[rows]), real), 50)
    assert low < value < high
