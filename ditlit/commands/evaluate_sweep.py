"""``ditlit evaluate sweep``: metrics over guidance scales, steps, samplers and intervals, as a table and plots."""

import csv
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ditlit.data.folders import SHOWN, check_output, check_writable, write_atomically, writing
from ditlit.errors import InputError
from ditlit.evaluation.passport import read_report
from ditlit.evaluation.plots import plot_guidance, plot_steps, pyplot

POINT = "point.json"


@dataclass(frozen=True)
class Point:
    """One combination of settings."""

    sampler: str
    num_steps: int
    guidance_scale: float
    interval: tuple[int, int] | None

    @property
    def name(self) -> str:
        """Of its folder."""
        interval = "" if self.interval is None else f"-interval-{self.interval[0]}-{self.interval[1]}"
        return f"{self.sampler}-{self.num_steps}-guidance-{self.guidance_scale:g}{interval}"


def evaluate_sweep(
    ckpt: str,
    reference: str,
    out: str,
    guidance_scale: str = "1,1.25,1.5,2,4",
    num_steps: str = "250",
    sampler: str = "ddpm",
    interval: str = "all",
    num_samples: int = 10_000,
    labels: Literal["balanced", "random"] = "balanced",
    weights: Literal["ema", "raw"] = "ema",
    guidance_channels: int | None = None,
    seed: int = 0,
    batch_size: int = 32,
    precision: Literal["32", "tf32", "bf16", "fp16"] = "32",
    vae: str | None = None,
    metrics: str | None = None,
    extractor: str = "inception",
    inception_weights: str | None = None,
    reference_size: int | None = None,
    keep_images: bool = False,
    accelerator: str = "auto",
    devices: str = "auto",
    num_nodes: int = 1,
    trust: str | None = None,
    num_heads: int | None = None,
) -> None:
    """Sample and evaluate every combination of the given settings.

    Example: ditlit evaluate sweep --ckpt runs/xl2/checkpoints/last.ckpt --reference VIRTUAL_imagenet256_labeled.npz
    --guidance_scale 1,1.25,1.5,2,4 --num_steps 25,50,100,250 --out sweep

    Each point is a ditlit sample and a ditlit evaluate in a folder of its own, with its report; a sweep that was
    stopped goes on where it was. The results are table.csv, table.md, and plots over guidance scale, steps and seconds.

    Args:
        ckpt: as for ditlit sample.
        reference: as for ditlit evaluate.
        out: folder of the sweep.
        guidance_scale: scales, separated by commas.
        num_steps: numbers of steps, separated by commas.
        sampler: samplers, separated by commas.
        interval: guidance intervals, separated by commas, each as LOWEST-HIGHEST timestep, or all for no interval.
        num_samples: images of each point. The published numbers are of 50,000.
        labels: whether the classes take turns or are drawn at random.
        weights: the moving average, or those that the optimizer holds.
        guidance_channels: guide only the first so many channels.
        seed: of all noise: the same in all points.
        batch_size: images drawn at once on each device.
        precision: of the denoiser.
        vae: instead of the VAE that the checkpoint names.
        metrics: as for ditlit evaluate.
        extractor: as for ditlit evaluate.
        inception_weights: as for ditlit evaluate.
        reference_size: as for ditlit evaluate.
        keep_images: keep the images of each point after its evaluation.
        accelerator: cpu, gpu, or auto.
        devices: number of devices of this machine, or auto.
        num_nodes: number of machines.
        trust: as for ditlit sample.
        num_heads: as for ditlit sample.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise InputError("evaluate sweep starts its own processes: run it without torchrun, with --devices")
    points = [
        Point(*values)
        for values in itertools.product(
            words(sampler), parsed(num_steps, int, "num_steps"), parsed(guidance_scale, float, "guidance_scale"),
            parsed(interval, interval_of, "interval"),
        )
    ]  # fmt: skip
    common = {"accelerator": accelerator, "devices": devices, "num_nodes": num_nodes}
    drawing = common | {
        "ckpt": ckpt, "num_samples": num_samples, "labels": labels, "weights": weights, "seed": seed,
        "guidance_channels": guidance_channels, "batch_size": batch_size, "precision": precision, "vae": vae,
        "trust": trust, "num_heads": num_heads,
    }  # fmt: skip
    judging = common | {
        "reference": reference, "metrics": metrics, "extractor": extractor, "inception_weights": inception_weights,
        "reference_size": reference_size,
    }  # fmt: skip
    folder = Path(out)
    settings = {k: v for k, v in (drawing | judging).items() if k not in common}
    begin(folder, settings, ("guidance.png", "steps.png"))
    rows = []
    for number, point in enumerate(points, 1):
        print(f"point {number} of {len(points)}: {point.name}", flush=True)
        rows.append(run_point(point, folder / "points" / point.name, drawing, judging, keep_images))
        text = write_tables(rows, folder)
    print(text)
    with writing(folder, SHOWN):
        plots = [plot_guidance(rows, folder / "guidance.png"), plot_steps(rows, folder / "steps.png")]
    print(f"Look at {' and '.join(str(path) for path in plots)}")


def words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def parsed(text: str, kind: Any, name: str) -> list:
    try:
        return [kind(word) for word in words(text)]
    except ValueError:
        raise InputError(f"--{name} takes values separated by commas, got {text!r}") from None


def interval_of(word: str) -> tuple[int, int] | None:
    if word == "all":
        return None
    low, high = word.split("-")
    return int(low), int(high)


def begin(folder: Path, settings: dict[str, Any], plots: Sequence[str]) -> None:
    """Begin or continue a sweep; what stands in the way of its results is found now, and not after the last point.

    Raises:
        InputError: for a folder whose points were made with other settings: they would not compare. Also where tables
            and plots cannot be written.
    """
    pyplot()
    check_writable(folder, "--out")
    for name in (*plots, "table.csv", "table.md"):
        check_output(folder / name, "--out")
    record = folder / "sweep.json"
    if not record.exists():
        write_atomically(record, json.dumps(settings, indent=1).encode())
        return
    try:
        begun = dict(json.loads(record.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{record} cannot be read ({error}): choose another --out") from None
    different = [name for name, value in settings.items() if begun.get(name) != value]
    if different:
        raise InputError(
            f"{record} says that this sweep was begun with other {', '.join(different)}: choose another --out"
        )


def run_point(
    point: Point, folder: Path, drawing: dict[str, Any], judging: dict[str, Any], keep_images: bool
) -> dict[str, Any]:
    """Sample and evaluate one point, unless it is done; returns its settings, seconds and metrics."""
    record = folder / POINT
    if record.exists():
        return json.loads(record.read_text())
    settings = {
        "sampler": point.sampler, "num_steps": point.num_steps, "guidance_scale": point.guidance_scale,
        "guidance_interval": None if point.interval is None else f"[{point.interval[0]},{point.interval[1]}]",
    }  # fmt: skip
    samples = folder / "samples"
    fresh = not samples.exists()
    start = time.perf_counter()
    run("sample", drawing | settings | {"out": samples})
    seconds = time.perf_counter() - start
    report = folder / "report.json"
    run("evaluate", judging | {"generated": samples, "out": report})
    row = settings | {"seconds": round(seconds, 1) if fresh else None, "metrics": read_report(report)["metrics"]}
    write_atomically(record, json.dumps(row, indent=1).encode())
    if not keep_images:
        shutil.rmtree(samples)
    return row


def run(command: str, settings: dict[str, Any]) -> None:
    """Run one command in a process of its own, which frees the device when it ends."""
    arguments = [word for name, value in settings.items() if value is not None for word in (f"--{name}", str(value))]
    if subprocess.run([sys.executable, "-m", "ditlit", command, *arguments]).returncode:
        raise InputError(f"ditlit {command} failed, see above; the points before it are kept")


def write_tables(rows: list[dict[str, Any]], folder: Path) -> str:
    """``table.csv`` and ``table.md``, a line for each point; returns the latter's text."""
    names = list(rows[0]["metrics"])
    settings = ["sampler", "num_steps", "guidance_scale", "guidance_interval", "seconds"]
    lines = [[row[name] for name in settings] + [row["metrics"][name] for name in names] for row in rows]
    shown = [["" if v is None else f"{v:.4g}" if isinstance(v, float) else str(v) for v in line] for line in lines]
    return write_table(folder, settings + names, lines, settings + names, shown)


def write_table(
    folder: Path, columns: list[str], lines: list[list[Any]], heads: list[str], shown: list[list[str]]
) -> str:
    """Write ``table.csv`` of lines, and ``table.md`` of the same as they are shown; returns the latter's text."""
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([columns, *lines])
    markdown = "".join("| " + " | ".join(line) + " |\n" for line in [heads, ["---"] * len(heads), *shown])
    for name, text in (("table.csv", file.getvalue()), ("table.md", markdown)):
        with writing(folder / name, f"{SHOWN}, and the points are kept"):
            write_atomically(folder / name, text.encode())
    return markdown
