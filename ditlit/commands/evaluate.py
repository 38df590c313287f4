"""``ditlit evaluate``: the metrics of generated images, with a record of how every number was made."""

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from lightning.fabric import Fabric

from ditlit.commands.encode import workers
from ditlit.commands.processes import Progress, ending_together, launch, share
from ditlit.data.folders import SHOWN, check_output, is_remote, writing
from ditlit.errors import InputError
from ditlit.evaluation.cache import FeatureCache
from ditlit.evaluation.extraction import extract
from ditlit.evaluation.extractors import Extractor, Inception, describe, load_extractor
from ditlit.evaluation.images import FolderImages
from ditlit.evaluation.protocol import (
    STATISTICS,
    Results,
    check_side,
    chosen_metrics,
    layers_of,
    measure,
    side_statistics,
)
from ditlit.evaluation.provenance import comparison, provenance, read_report, write_report
from ditlit.evaluation.sources import Source, content_hash, open_source, write_statistics
from ditlit.settings.evaluate import EvaluateSettings


@ending_together
def evaluate(settings: EvaluateSettings) -> None:
    """See :class:`EvaluateSettings`."""
    if settings.compare is not None:
        print(compared(settings.reports))
        return
    generated, judging = settings.generated, settings.judging
    path, statistics = check_outputs(settings)
    network = load_extractor(judging.extractor, judging.inception_weights)
    chosen = chosen_metrics(judging.metrics, network)
    if statistics is not None and not STATISTICS.keys() & set(chosen):
        raise InputError(f"--save_stats saves what {' and '.join(STATISTICS)} need: --metrics must name one of them")
    fabric, on_this_machine = launch(settings.execution)
    device = fabric.device
    network = network.to(device)
    start = time.perf_counter()
    opened = partial(open_source, extractor=network, vae=settings.vae, device=device)
    right = opened(settings.reference, size=judging.reference_size)
    left = None if generated is None else opened(generated, size=settings.generated_size)
    sizes = None if settings.sample_sizes is None or left is None else parse_sizes(settings.sample_sizes, left)
    if left is not None:
        check_side(chosen, left, generated=True)
        check_side(chosen, right, generated=False)
    num_workers = workers(on_this_machine) if settings.num_workers is None else settings.num_workers
    sides = FeatureSides(network, chosen, FeatureCache(settings.cache), fabric, settings.batch_size, num_workers)
    hashes = [sides.fill(side, name) for side, name in ((left, "generated"), (right, "reference")) if side is not None]
    if fabric.global_rank != 0:
        return
    # Devices without float64 leave the metrics to the CPU.
    at = device if device.type == "cuda" else torch.device("cpu")
    if left is not None:
        extracted = time.perf_counter() - start
        results = measure(
            chosen, left, right, network, sizes, settings.bootstrap, at, lambda name: print(f"computing {name}")
        )
        results.warnings += notes(left, right, network)
        seconds = {"features": round(extracted, 1), "metrics": round(time.perf_counter() - start - extracted, 1)}
        report = provenance(
            results, left, right, network, device, tuple(hashes), seconds=seconds, devices=fabric.world_size,
            **{"batch size": settings.batch_size, "features from the cache": sides.cached},
        )  # fmt: skip
        print(table(results))
        with writing(path, SHOWN):
            write_report(report, path)
        print(f"How these numbers were made: {path}")
    if statistics is not None:
        save(statistics, right, network, at)


def check_outputs(settings: EvaluateSettings) -> tuple[Path | None, Path | None]:
    """Files of the report and of the reference's statistics, where they are wanted; both can be written.

    Raises:
        InputError: where one cannot: told now, and not after the last image.
    """
    generated, out = settings.generated, settings.out
    report = None if generated is None else report_path(generated, out)
    if report is not None and (out is not None or is_remote(generated) or Path(generated).exists()):
        check_output(report, "--out")
    statistics = None if settings.save_stats is None else Path(settings.save_stats)
    if statistics is not None:
        check_output(statistics, "--save_stats")
    return report, statistics


class FeatureSides:
    """Extracts the features that a side needs, or finds them in the cache.

    Args:
        extractor: on its device.
        metrics: that will be computed.
        cache: of the features.
        fabric: of the processes.
        batch_size: images in the extractor at once.
        num_workers: processes that read images.
    """

    def __init__(
        self, extractor: Extractor, metrics: Sequence[str], cache: FeatureCache, fabric: Fabric, batch_size: int,
        num_workers: int,
    ):  # fmt: skip
        self.extractor = extractor
        self.metrics = metrics
        self.cache = cache
        self.fabric = fabric
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.cached: list[str] = []  # sides whose features were all there

    def fill(self, source: Source, side: Literal["generated", "reference"]) -> str:
        """Put features into a side, on the first process; returns the hash of its content, likewise."""
        first = self.fabric.global_rank == 0
        if first and source.images is not None:
            print(f"reading {source.images.location}")
        layers = layers_of(self.metrics, source, side == "generated") if source.images is not None else []
        content = content_hash(source) if first else ""
        if not layers:
            return content
        images = source.images.digest() if first and source.statistics else content
        identity = {"images": images, **describe(self.extractor)} if first else {}
        n = len(source.images)

        def make(missing: Sequence[str], folder: Path) -> None:
            batches = share(range(-(-n // self.batch_size)), self.fabric)
            mine = sum(min(self.batch_size, n - k * self.batch_size) for k in batches)
            with Progress(f"features, {side}", n, 0, mine, self.fabric) as progress:
                extract(
                    source.images, self.extractor, missing, folder, self.batch_size, self.num_workers,
                    self.fabric.device, progress.advance,
                )  # fmt: skip

        features, cached = self.cache.get(identity, layers, make)
        source.features |= features
        if cached:
            self.cached.append(side)
        return content


def parse_sizes(text: str, generated: Source) -> list[int]:
    """Numbers of images; none for auto."""
    if generated.images is None:
        raise InputError("--sample_sizes needs generated images, and there are statistics only")
    if text == "auto":
        return []
    try:
        sizes = sorted({int(word) for word in text.split(",")})
    except ValueError:
        raise InputError(f"--sample_sizes takes numbers separated by commas, or auto; got {text!r}") from None
    if sizes[0] < 2 or sizes[-1] > len(generated.images):
        raise InputError(f"--sample_sizes lie between 2 and the {len(generated.images):,} images, got {text}")
    return sizes


def save(path: Path, reference: Source, extractor: Extractor, device: torch.device) -> None:
    for layer in STATISTICS.values():
        if layer in reference.features:
            side_statistics(reference, layer, device)
    with writing(path):
        write_statistics(path, reference, extractor)
    print(f"statistics of {reference.about['location']}: {path}")


def notes(generated: Source, reference: Source, extractor: Extractor) -> list[str]:
    """What is odd about the two sides."""
    found = []
    sizes = [side.about.get("size") for side in (generated, reference)]
    if None not in sizes and sizes[0] != sizes[1]:
        found.append(
            f"the generated images are {sizes[0]}, the reference's {sizes[1]}: the extractor sees other detail"
        )
    if isinstance(extractor, Inception) and not extractor.original:
        found.append("these are not torch-fidelity's Inception weights: the numbers compare with nothing published")
    if isinstance(generated.images, FolderImages) and generated.images.size is not None:
        found.append("the generated images were resized before the extractor's own resizing: published ones are not")
    return found


def report_path(generated: str, out: str | None) -> Path:
    """Where the report goes: of images at a URL, into the working folder."""
    path = Path(generated if out is None else out)
    if path.is_dir():
        return path / "report.json"
    if out is not None:
        return path
    return Path(f"{path.name}.report.json") if is_remote(generated) else path.with_suffix(".report.json")


def table(results: Results) -> str:
    lines = []
    for name, value in results.metrics.items():
        interval = results.intervals.get(name)
        lines.append(f"  {name:40} {value:12.5g}" + (f"   [{interval[0]:.5g}, {interval[1]:.5g}]" if interval else ""))
    if results.sample_sizes:
        lines.append("  distance by number of images:")
        lines += [f"    {size:>10} {value:12.5g}" for size, value in results.sample_sizes.items()]
    return "\n".join([*lines, *(f"note: {warning}" for warning in results.warnings)])


def compared(paths: list[str]) -> str:
    return comparison(*(read_report(Path(path)) for path in paths), names=tuple(short(paths)))


def short(paths: list[str]) -> list[str]:
    """Names for two files, without the folders that they share."""
    parts = [Path(path).parts for path in paths]
    while len(parts[0]) > 1 and len(parts[1]) > 1 and parts[0][-1] == parts[1][-1]:
        parts = [part[:-1] for part in parts]
    return [part[-1] for part in parts]
