"""The record of how a number was made, and what differs between two of them."""

import json
import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ditlit import __version__
from ditlit.data.folders import write_atomically
from ditlit.errors import InputError
from ditlit.evaluation.extractors import Extractor, describe
from ditlit.evaluation.protocol import SETTINGS, Results
from ditlit.evaluation.sources import Source

PACKAGES = ("torch", "torchvision", "torch-fidelity", "numpy", "pillow", "lightning", "diffusers")


def provenance(
    results: Results,
    generated: Source,
    reference: Source,
    extractor: Extractor,
    device: torch.device,
    hashes: tuple[str, str],
    **about: Any,
) -> dict[str, Any]:
    """A report: the numbers, and all that they depend on.

    Args:
        results: the numbers.
        generated, reference: the sides.
        extractor: of the features.
        device: that computed them.
        hashes: of the content of the two sides.
        about: more entries: batch size, seconds.
    """
    return {
        "metrics": results.metrics,
        "intervals": results.intervals,
        "sample sizes": results.sample_sizes,
        "warnings": results.warnings,
        "generated": generated.about | {"hash": hashes[0]},
        "reference": reference.about | {"hash": hashes[1]},
        "extractor": describe(extractor),
        "settings": SETTINGS,
        "versions": {"ditlit": __version__, "python": platform.python_version(), **versions()},
        "hardware": hardware(device),
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        **about,
    }


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def write_report(report: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(report, indent=1).encode())


def read_report(path: Path) -> dict[str, Any]:
    """A report that ``evaluate`` wrote.

    Raises:
        InputError: where there is none.
    """
    try:
        report = json.loads(path.read_text())
        report["metrics"], report["extractor"], report["generated"], report["reference"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no report of ditlit evaluate ({type(error).__name__}: {error})") from None
    return report


class Suspect(NamedTuple):
    """Something that may differ between two reports: where it stands in them, and what it is worth."""

    name: str
    path: str
    why: str


UNKNOWN = "not on record"

# The most suspicious first.
SUSPECTS = (
    Suspect("extractor", "extractor.name", "distances of different features do not compare at all"),
    Suspect(
        "extractor's weights", "extractor.weights", "other weights give other features: the numbers do not compare"
    ),
    Suspect(
        "extractor's resizing", "extractor.resize", "another filter before the extractor moves FID by whole points"
    ),
    Suspect(
        "reference", "reference.hash", "a distance is to its reference: another set, split or crop is another metric"
    ),
    Suspect("reference's kind", "reference.kind", "statistics of the training set and of some images of it differ"),
    Suspect("reference's resizing", "reference.resize", "a sharper or softer reference moves FID by up to a point"),
    Suspect(
        "number of reference images", "reference.n", "precision and recall fall and rise with it; FID is biased by it"
    ),
    Suspect(
        "number of images", "generated.n", "FID is biased upward by about c/N: 10,000 images cost XL/2 some 2 points"
    ),
    Suspect("resolution", "generated.size", "the extractor sees other detail"),
    Suspect(
        "resizing of the generated images", "generated.resize", "published numbers resize nothing before Inception"
    ),
    Suspect(
        "quantisation", "generated.job.quantisation", "truncating instead of rounding darkens by half a grey level"
    ),
    Suspect("extractor's code", "extractor.code", "look whether its preprocessing has changed"),
    Suspect("settings of the metrics", "settings", "k, splits and subsets are part of a metric's definition"),
    Suspect("checkpoint", "generated.job.checkpoint", "these are other weights"),
    Suspect("step", "generated.job.step", "XL/2 goes from FID 19.5 at 400 thousand steps to 9.6 at 7 million"),
    Suspect("weights", "generated.job.weights", "the moving average is worth many points over the raw weights"),
    Suspect(
        "guidance scale", "generated.job.sampling.guidance_scale", "XL/2: FID 9.62 without, 3.22 at 1.25, 2.27 at 1.5"
    ),
    Suspect(
        "guided channels",
        "generated.job.sampling.guidance_channels",
        "guiding 3 of 4 channels at 1 + x behaves like all of them at 1 + 0.75 x",
    ),
    Suspect(
        "guidance interval",
        "generated.job.sampling.guidance_interval",
        "guidance in the middle of sampling only can lower FID by half a point",
    ),
    Suspect("sampler", "generated.job.sampling.sampler", "samplers differ most with few steps"),
    Suspect("steps", "generated.job.sampling.num_steps", "fewer than 250 DDPM steps cost FID"),
    Suspect(
        "spacing of the steps", "generated.job.sampling.spacing", "the released code's ddimN misses the last timestep"
    ),
    Suspect("eta", "generated.job.sampling.eta", "noise in DDIM's steps"),
    Suspect("VAE", "generated.job.vae", "the decoder alone: FID 2.46 with the original, 2.30 ft-MSE, 2.27 ft-EMA"),
    Suspect("VAE of the store", "generated.vae", "the decoder alone moves FID by some tenths"),
    Suspect("tiled decoding", "generated.job.vae_tiling", "seams may show"),
    Suspect("labels", "generated.job.labels", "labels drawn balanced rather than at random are worth about 0.1 FID"),
    Suspect("classes", "generated.job.classes", "missing classes are missing modes"),
    Suspect("precision", "generated.job.precision", "bf16 sampling moves FID by some hundredths"),
    Suspect("seed", "generated.job.seed", "FID of 50,000 images varies by about 0.02 to 0.05 from seed to seed"),
    Suspect("batch size of sampling", "generated.job.batch_size", "kernels round differently: below what FID can see"),
    Suspect("generated images", "generated.hash", "these are other images"),
    Suspect("versions", "versions", "kernels round differently: expect a few thousandths"),
    Suspect("hardware", "hardware", "kernels round differently: expect a few thousandths"),
    Suspect("batch size of the extractor", "batch size", "kernels round differently: below what FID can see"),
)


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[tuple[Suspect, Any, Any]]:
    """What differs between two reports, the most suspicious first, with both values."""
    pairs = [(suspect, look_up(a, suspect.path), look_up(b, suspect.path)) for suspect in SUSPECTS]
    return [(suspect, x, y) for suspect, x, y in pairs if x != y]


def look_up(report: Mapping[str, Any], path: str) -> Any:
    value: Any = report
    for word in path.split("."):
        value = value.get(word, UNKNOWN) if isinstance(value, Mapping) else UNKNOWN
    return value


def comparison(a: Mapping[str, Any], b: Mapping[str, Any], names: tuple[str, str]) -> str:
    """Numbers and differences of two reports in words."""
    lines = [f"{'':24} {names[0]:>20} {names[1]:>20}"]
    for metric in dict.fromkeys([*a["metrics"], *b["metrics"]]):
        values = [f"{r['metrics'][metric]:.5g}" if metric in r["metrics"] else "-" for r in (a, b)]
        lines.append(f"{metric:24} {values[0]:>20} {values[1]:>20}")
    found = differences(a, b)
    lines.append("")
    if not found:
        lines.append("Nothing on record differs: the numbers should be the same.")
    else:
        lines.append("What differs, the most suspicious first:")
    for number, (suspect, x, y) in enumerate(found, 1):
        lines.append(f"{number:3}. {suspect.name}: {in_words(x, y)}\n     {suspect.why}")
    return "\n".join(lines)


def in_words(x: Any, y: Any) -> str:
    if isinstance(x, Mapping) and isinstance(y, Mapping):
        keys = [key for key in {**x, **y} if x.get(key) != y.get(key)]
        return ", ".join(f"{key} {x.get(key)} | {y.get(key)}" for key in keys)
    values = [value[:12] if isinstance(value, str) and len(value) == 64 else value for value in (x, y)]
    return " | ".join("unset" if value is None else str(value) for value in values)
