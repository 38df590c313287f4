"""``ditlit evaluate sweep``: metrics over guidance scales, steps, samplers and intervals, as a table and plots."""

import csv
import io
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ditlit.data.folders import SHOWN, check_output, check_writable, write_atomically, writing
from ditlit.errors import InputError
from ditlit.evaluation.plots import plot_guidance, plot_steps, pyplot
from ditlit.evaluation.provenance import read_report
from ditlit.settings import Reading, Sampling
from ditlit.settings.evaluate import EvaluateSettings, ScalingSettings, SweepSettings
from ditlit.settings.flags import as_words
from ditlit.settings.sample import SampleSettings

POINT = "point.json"


def evaluate_sweep(settings: SweepSettings) -> None:
    """See :class:`SweepSettings`."""
    folder, points = Path(settings.out), settings.points
    recorded = {"ckpt": settings.ckpt, "guidance_channels": settings.guidance_channels} | asdict(settings.reading)
    begin(folder, recorded | record(settings), ("guidance.png", "steps.png"))
    rows = []
    for number, point in enumerate(points, 1):
        print(f"point {number} of {len(points)}: {name_of(point)}", flush=True)
        sampled = sampling_of(settings, settings.ckpt, point, settings.reading)
        rows.append(run_point(sampled, settings, folder / "points" / name_of(point), settings.keep_images))
        text = write_tables(rows, folder)
    print(text)
    with writing(folder, SHOWN):
        plots = [plot_guidance(rows, folder / "guidance.png"), plot_steps(rows, folder / "steps.png")]
    print(f"Look at {' and '.join(str(path) for path in plots)}")


def name_of(point: Sampling) -> str:
    """Of a point's folder."""
    interval = point.guidance_interval
    within = "" if interval is None else f"-interval-{interval[0]}-{interval[1]}"
    return f"{point.sampler}-{point.num_steps}-guidance-{point.guidance_scale:g}{within}"


def record(settings: SweepSettings | ScalingSettings) -> dict[str, Any]:
    """What all points have in common, and must have in common to compare."""
    common = {"num_samples": settings.num_samples, "reference": settings.reference}
    return common | asdict(settings.drawing) | asdict(settings.judging)


def sampling_of(
    settings: SweepSettings | ScalingSettings, ckpt: str, point: Sampling, reading: Reading = Reading()
) -> SampleSettings:
    """The settings of ``ditlit sample`` for a point, but for its folder."""
    return SampleSettings(
        ckpt=ckpt, out="", num_samples=settings.num_samples, sampling=point, drawing=settings.drawing,
        execution=settings.execution, reading=reading,
    )  # fmt: skip


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
    file = folder / "sweep.json"
    if not file.exists():
        write_atomically(file, json.dumps(settings, indent=1).encode())
        return
    try:
        begun = dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{file} cannot be read ({error}): choose another --out") from None
    given = json.loads(json.dumps(settings))
    different = [name for name, value in begun.items() if given.get(name) != value]
    if different:
        raise InputError(
            f"{file} says that this sweep was begun with other {', '.join(different)}: choose another --out"
        )


def run_point(
    sampled: SampleSettings, settings: SweepSettings | ScalingSettings, folder: Path, keep_images: bool
) -> dict[str, Any]:
    """Sample and evaluate one point, unless it is done; returns its settings, seconds and metrics."""
    done = folder / POINT
    if done.exists():
        return json.loads(done.read_text())
    samples, report = folder / "samples", folder / "report.json"
    fresh = not samples.exists()
    start = time.perf_counter()
    run("sample", replace(sampled, out=str(samples)))
    seconds = time.perf_counter() - start
    judged = EvaluateSettings(
        generated=str(samples), reference=settings.reference, out=str(report), judging=settings.judging,
        execution=settings.execution,
    )  # fmt: skip
    run("evaluate", judged)
    point = sampled.sampling
    row = {name: getattr(point, name) for name in ("sampler", "num_steps", "guidance_scale")}
    interval = point.guidance_interval
    row["guidance_interval"] = None if interval is None else f"[{interval[0]},{interval[1]}]"
    row |= {"seconds": round(seconds, 1) if fresh else None, "metrics": read_report(report)["metrics"]}
    write_atomically(done, json.dumps(row, indent=1).encode())
    if not keep_images:
        shutil.rmtree(samples)
    return row


def run(command: str, settings: SampleSettings | EvaluateSettings) -> None:
    """Run one command in a process of its own, which frees the device when it ends."""
    if subprocess.run([sys.executable, "-m", "ditlit", command, *as_words(settings)]).returncode:
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
