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
from ditlit.errors import InputError, check_positive
from ditlit.evaluation.cache import DEFAULT_FOLDER, FeatureCache
from ditlit.evaluation.extraction import extract
from ditlit.evaluation.extractors import Extractor, Inception, describe, load_extractor
from ditlit.evaluation.images import FolderImages
from ditlit.evaluation.passport import comparison, passport, read_report, write_report
from ditlit.evaluation.protocol import (
    STATISTICS,
    Results,
    check_side,
    chosen_metrics,
    layers_of,
    measure,
    side_statistics,
)
from ditlit.evaluation.sources import Source, content_hash, open_source, write_statistics


@ending_together
def evaluate(
    generated: str | None = None,
    reference: str | None = None,
    out: str | None = None,
    metrics: str | None = None,
    extractor: str = "inception",
    inception_weights: str | None = None,
    generated_size: int | None = None,
    reference_size: int | None = None,
    vae: str | None = None,
    sample_sizes: str | None = None,
    bootstrap: int = 0,
    save_stats: str | None = None,
    compare: str | None = None,
    batch_size: int = 64,
    num_workers: int | None = None,
    cache: str = DEFAULT_FOLDER,
    accelerator: str = "auto",
    devices: str = "auto",
    num_nodes: int = 1,
) -> None:
    """Compute FID, sFID, Inception Score, precision, recall and KID as the ADM evaluator does.

    Example: ditlit evaluate --generated samples --reference VIRTUAL_imagenet256_labeled.npz

    Each side is a folder of images, an npz file of images (arr_0) or of ADM's statistics, a statistics file of ours, or
    a latent store. Beside the numbers a report is written that says how they were made; --compare A.json,B.json tells
    what differs between two.

    Args:
        generated: the generated images; of a ditlit sample folder, everything that it was asked for is put on record.
        reference: what they are compared with.
        out: file of the report, or a folder for report.json; by default in the folder of the generated images, beside
            their file, or in the working folder where they are at a URL.
        metrics: which, separated by commas: fid, sfid, is, precision, recall, kid. By default all that the extractor
            serves.
        extractor: inception, dinov2, or the class path of another one, whose distances carry its name and are no FID.
        inception_weights: file of Inception's weights; by default the one in torch's hub cache.
        generated_size: cut and resize the images of the generated folder to this side, as encode does. Published
            numbers do not.
        reference_size: the same for the reference.
        vae: folder or hub name of the VAE that decodes a latent store, instead of the one that the store names.
        sample_sizes: also give the distance of so many generated images, separated by commas, or auto, and extrapolate
            to infinitely many.
        bootstrap: resamples for an interval around each metric; 0 for none.
        save_stats: write the reference's statistics to this file, to be a reference later; does without generated.
        compare: instead of evaluating, say what differs between two reports, separated by a comma.
        batch_size: images in the extractor at once on each device.
        num_workers: processes on each device that read images; by default one for each CPU core but one.
        cache: folder in which features are kept, to be found again by their images' content; without a folder that can
            be written, they are made anew each time.
        accelerator: cpu, gpu, or auto.
        devices: number of devices of this machine, or auto: all GPUs, or one process on the CPU.
        num_nodes: number of machines.
    """
    if compare is not None:
        print(compared(compare))
        return
    if reference is None or (generated is None and save_stats is None):
        raise InputError("evaluate needs --generated and --reference, or --reference and --save_stats; see --help")
    check_positive(batch_size=batch_size, generated_size=generated_size, reference_size=reference_size)
    if bootstrap < 0 or bootstrap == 1:
        raise InputError(f"--bootstrap needs at least 2 resamples, got {bootstrap}")
    path = None if generated is None else report_path(generated, out)
    if path is not None and (out is not None or is_remote(generated) or Path(generated).exists()):
        check_output(path, "--out")
    if save_stats is not None:
        check_output(Path(save_stats), "--save_stats")
    network = load_extractor(extractor, inception_weights)
    chosen = chosen_metrics(metrics, network)
    if save_stats is not None and not STATISTICS.keys() & set(chosen):
        raise InputError(f"--save_stats saves what {' and '.join(STATISTICS)} need: --metrics must name one of them")
    fabric, on_this_machine = launch(accelerator, devices, num_nodes)
    device = fabric.device
    network = network.to(device)
    start = time.perf_counter()
    opened = partial(open_source, extractor=network, vae=vae, device=device)
    right = opened(reference, size=reference_size)
    left = None if generated is None else opened(generated, size=generated_size)
    sizes = None if sample_sizes is None or left is None else parse_sizes(sample_sizes, left)
    if left is not None:
        check_side(chosen, left, generated=True)
        check_side(chosen, right, generated=False)
    sides = FeatureSides(
        network,
        chosen,
        FeatureCache(cache),
        fabric,
        batch_size,
        workers(on_this_machine) if num_workers is None else num_workers,
    )
    hashes = [sides.fill(side, name) for side, name in ((left, "generated"), (right, "reference")) if side is not None]
    if fabric.global_rank != 0:
        return
    # Devices without float64 leave the metrics to the CPU.
    at = device if device.type == "cuda" else torch.device("cpu")
    if left is None:
        save(Path(save_stats), right, network, at)
        return
    extracted = time.perf_counter() - start
    results = measure(chosen, left, right, network, sizes, bootstrap, at, lambda name: print(f"computing {name}"))
    results.warnings += notes(left, right, network)
    seconds = {"features": round(extracted, 1), "metrics": round(time.perf_counter() - start - extracted, 1)}
    report = passport(
        results, left, right, network, device, tuple(hashes), seconds=seconds, devices=fabric.world_size,
        **{"batch size": batch_size, "features from the cache": sides.cached},
    )  # fmt: skip
    print(table(results))
    with writing(path, SHOWN):
        write_report(report, path)
    print(f"How these numbers were made: {path}")
    if save_stats is not None:
        save(Path(save_stats), right, network, at)


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


def compared(text: str) -> str:
    paths = [word.strip() for word in text.split(",")]
    if len(paths) != 2:
        raise InputError(f"--compare takes two reports separated by a comma, got {text!r}")
    return comparison(*(read_report(Path(path)) for path in paths), names=tuple(short(paths)))


def short(paths: list[str]) -> list[str]:
    """Names for two files, without the folders that they share."""
    parts = [Path(path).parts for path in paths]
    while len(parts[0]) > 1 and len(parts[1]) > 1 and parts[0][-1] == parts[1][-1]:
        parts = [part[:-1] for part in parts]
    return [part[-1] for part in parts]
