"""One side against the other: which metrics, by which names, and what to think of the numbers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ditlit.errors import InputError
from ditlit.evaluation.confidence import (
    default_sizes,
    distance_interval,
    distances_by_size,
    extrapolated,
    mean_interval,
    score_interval,
)
from ditlit.evaluation.extractors import Extractor, Inception
from ditlit.evaluation.metrics import (
    INCEPTION_SPLIT,
    KERNEL_SEED,
    KERNEL_SUBSET_SIZE,
    KERNEL_SUBSETS,
    NEIGHBOURS,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from ditlit.evaluation.sources import Source
from ditlit.evaluation.statistics import Statistics, statistics_of

ENOUGH = 50_000  # images of the published numbers
METRICS = ("fid", "sfid", "is", "precision", "recall", "kid")
OF_INCEPTION = dict(zip(METRICS, ("FID", "sFID", "IS", "precision", "recall", "KID"), strict=True))
OF_OTHERS = OF_INCEPTION | {"fid": "Frechet distance", "sfid": "spatial Frechet distance", "kid": "kernel distance"}
# Layer whose statistics, and whose features, each metric takes.
STATISTICS = {"fid": "pool", "sfid": "spatial"}
FEATURES = {"precision": "pool", "recall": "pool", "kid": "pool"}
SETTINGS = {
    "precision and recall": f"k = {NEIGHBOURS}",
    "IS": f"splits of {INCEPTION_SPLIT}, logits without bias",
    "KID": f"{KERNEL_SUBSETS} subsets of {KERNEL_SUBSET_SIZE}, cubic kernel, seed {KERNEL_SEED}",
}


def title(metric: str, extractor: Extractor) -> str:
    """Name of a metric. Only distances of Inception's features are FID, sFID and KID."""
    if isinstance(extractor, Inception):
        return OF_INCEPTION[metric]
    return f"{OF_OTHERS[metric]} ({extractor.name})"


def chosen_metrics(text: str | None, extractor: Extractor) -> list[str]:
    """The metrics of a list separated by commas; by default all that the extractor has layers for.

    Raises:
        InputError: for unknown metrics, or those that the extractor cannot serve.
    """
    needs = {"sfid": "spatial", "is": "logits"}
    possible = [m for m in METRICS if needs.get(m, "pool") in extractor.layers]
    if text is None:
        return possible
    words = [word.strip().lower() for word in text.split(",")]
    for word in words:
        if word not in METRICS:
            raise InputError(f"--metrics takes {', '.join(METRICS)}, separated by commas; got {word!r}")
        if word not in possible:
            raise InputError(f"{extractor.name} has no {needs[word]} layer for {word}; it serves {', '.join(possible)}")
    return [m for m in METRICS if m in words]


def layers_of(metrics: Sequence[str], source: Source, generated: bool) -> list[str]:
    """Layers to extract from a side's images."""
    wanted = {STATISTICS[m] for m in metrics if m in STATISTICS and STATISTICS[m] not in source.statistics}
    wanted |= {FEATURES[m] for m in metrics if m in FEATURES and FEATURES[m] not in source.features}
    if generated and "is" in metrics:
        wanted.add("logits")
    return sorted(wanted)


def check_side(metrics: Sequence[str], source: Source, generated: bool) -> None:
    """Refuse a side of too few images, and what one without images cannot give.

    Raises:
        InputError: naming the side and what it lacks.
    """
    check_count(count(source))
    if source.images is not None or not layers_of(metrics, source, generated):
        return
    served = [m for m in metrics if not layers_of([m], source, generated)]
    raise InputError(
        f"{source.about.get('statistics file', source.about['location'])} has no images, and what it holds serves "
        f"{', '.join(served) or 'none of these metrics'} only; set --metrics to that"
    )


def check_count(n: int | None) -> None:
    if n is not None and n < 2:
        raise InputError("both sides need at least two images")


@dataclass
class Results:
    """Numbers by their names.

    Args:
        metrics: the numbers.
        intervals: lower and upper end of 95 % of the spread over resampled images.
        sample_sizes: Fréchet distance by number of generated images, and ``infinity``.
        warnings: what to think of the numbers.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, list[float]] = field(default_factory=dict)
    sample_sizes: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def measure(
    metrics: Sequence[str],
    generated: Source,
    reference: Source,
    extractor: Extractor,
    sample_sizes: Sequence[int] | None = None,
    bootstrap: int = 0,
    device: torch.device | str = "cpu",
    working_on: Callable[[str], Any] = lambda name: None,
) -> Results:
    """All metrics of two sides whose features have been extracted.

    Args:
        metrics: of :data:`METRICS`.
        generated, reference: the sides.
        extractor: names the metrics.
        sample_sizes: compute the distance for so many generated images too, and extrapolate; an empty list for sizes
            from a tenth of them on.
        bootstrap: resamples for the intervals; 0 for none.
        device: to compute on.
        working_on: called with the name of each metric.
    """
    results = Results()
    n = count(generated)
    check_count(n)
    check_count(min(map(len, reference.features.values()), default=None))
    for metric in [m for m in metrics if m in STATISTICS]:
        name, layer = title(metric, extractor), STATISTICS[metric]
        working_on(name)
        a, b = (side_statistics(side, layer, device) for side in (generated, reference))
        if a.mean.shape != b.mean.shape:
            raise InputError(f"{name}: features of {len(a.mean)} and {len(b.mean)} dimensions do not compare")
        value = results.metrics[name] = frechet_distance(a, b)
        features = generated.features.get(layer)
        if features is None:
            continue
        results.warnings += bias_warnings(name, value, features, b, device)
        if bootstrap:
            results.intervals[name] = distance_interval(value, features, b, bootstrap, device)
        if sample_sizes is not None and metric == "fid":
            sizes = list(sample_sizes) or default_sizes(n)
            found = distances_by_size(features, b, sizes, device=device)
            results.sample_sizes = {str(size): distance for size, distance in found.items()}
            if len(found) > 1:
                results.sample_sizes["infinity"] = extrapolated(found)
    if "is" in metrics:
        name = title("is", extractor)
        working_on(name)
        logits = generated.features["logits"]
        results.metrics[name], _ = inception_score(logits)
        if bootstrap:
            results.intervals[name] = score_interval(results.metrics[name], logits, bootstrap)
        if generated.about.get("job", {}).get("labels") == "class by class" and n > INCEPTION_SPLIT:
            results.warnings.append(
                f"{name}: images lie class by class, and each split of {INCEPTION_SPLIT:,} sees only some classes, "
                "which lowers it; draw with --num_samples instead of --per_class"
            )
    wanted = [m for m in ("precision", "recall") if m in metrics]
    sides = [side.features["pool"] for side in (generated, reference)] if wanted else []
    if wanted and min(map(len, sides)) <= NEIGHBOURS:
        text = f"precision and recall need more than {NEIGHBOURS} images on both sides"
        if wanted == list(metrics):
            raise InputError(text)
        results.warnings.append(f"{text}: left out")  # the other numbers are not lost
    elif wanted:
        working_on("precision and recall")
        found = precision_recall(*sides, device=device)
        for metric, inside in (("precision", found.precise), ("recall", found.recalled)):
            if metric in wanted:
                name = title(metric, extractor)
                results.metrics[name] = getattr(found, metric)
                if bootstrap:
                    results.intervals[name] = mean_interval(inside.numpy(), bootstrap)
        if len(sides[0]) < ENOUGH or len(sides[1]) < 10_000:
            results.warnings.append(
                f"precision and recall of {len(sides[0]):,} generated and {len(sides[1]):,} real images compare with "
                "those of the same numbers only (published: 50,000 and 10,000): fewer images have wider balls"
            )
    if "kid" in metrics:
        name = title("kid", extractor)
        working_on(name)
        estimates = kernel_distance(*(side.features["pool"] for side in (generated, reference)), device=device)
        results.metrics[name] = float(estimates.mean())
        if bootstrap and len(estimates) > 1:
            results.intervals[name] = mean_interval(estimates, bootstrap)
    return results


def count(source: Source) -> int | None:
    """Number of images of a side; None where only statistics are known."""
    return len(source.images) if source.images is not None else source.about.get("n")


def side_statistics(source: Source, layer: str, device: torch.device | str) -> Statistics:
    if layer not in source.statistics:
        source.statistics[layer] = statistics_of(source.features[layer], device)
    known = source.statistics[layer]
    if known.mean.device != torch.device(device):
        known = source.statistics[layer] = Statistics(known.mean.to(device), known.cov.to(device), known.n)
    return known


def bias_warnings(
    name: str, value: float, features: torch.Tensor, real: Statistics, device: torch.device | str
) -> list[str]:
    """What fewer images than those of the published numbers do to a distance.

    The bias falls as 1/N, so half of the images have twice of it: the distance grows by about the bias itself.
    """
    n, dimension = features.shape
    if n >= ENOUGH or n < 4:
        return []
    half = distances_by_size(features, real, [n // 2], device=device)[n // 2]
    text = (
        f"{name} of {n:,} images is higher than that of infinitely many, by about {max(half - value, 0):.2g} as half "
        "of them tell; published numbers are of 50,000"
    )
    if n <= dimension:
        text += f". {n:,} images cannot show a covariance in {dimension:,} dimensions: do not trust the number at all"
    return [text]
