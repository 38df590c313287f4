"""Plots of a sweep: metrics over the guidance scale, distance over steps and seconds; and of scaling."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ditlit.errors import InputError

Row = dict[str, Any]


def pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise InputError("plots need matplotlib: pip install 'ditlit[evaluate]'") from None
    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot


def plot_guidance(rows: Sequence[Row], path: Path) -> Path:
    """One panel for each metric over the guidance scale, a line for each sampler, number of steps and interval."""
    lines = grouped(rows, ("sampler", "num_steps", "guidance_interval"))
    names = list(rows[0]["metrics"])
    return draw(path, [(name, "guidance_scale", name) for name in names], lines)


def plot_steps(rows: Sequence[Row], path: Path) -> Path:
    """The first metric over the number of steps and over seconds, a line for each sampler, scale and interval."""
    lines = grouped(rows, ("sampler", "guidance_scale", "guidance_interval"))
    name = next(iter(rows[0]["metrics"]))
    return draw(path, [(name, "num_steps", name), (name, "seconds", name)], lines, log=True)


def plot_scaling(rows: Sequence[Row], path: Path) -> Path:
    """The first metric over the multiply-adds of a forward pass, and the held-out loss over the compute of training."""
    plt = pyplot()
    name = next(iter(rows[0]["metrics"]))
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for row in rows:
        value = row["metrics"][name]
        left.scatter(row["gmacs"], value, s=20 + 3 * row["parameters"] / 1e6, alpha=0.6)
        left.annotate(row["model"], (row["gmacs"], value), xytext=(7, 5), textcoords="offset points", fontsize="small")
        right.plot(*zip(*row["losses"], strict=True), marker="o", markersize=3, label=row["model"])
    left.set(xlabel="multiply-adds of a forward pass (G)", ylabel=name, title="areas: parameters")
    right.set(xlabel="training compute (PFLOP)", ylabel="held-out loss")
    right.legend(fontsize="small")
    for axis in (left, right):
        axis.set_xscale("log")
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def grouped(rows: Sequence[Row], by: Sequence[str]) -> dict[str, list[Row]]:
    lines = defaultdict(list)
    for row in rows:
        lines[", ".join(label(name, row[name]) for name in by if row[name] is not None)].append(row)
    return lines


def label(name: str, value: Any) -> str:
    words = {"num_steps": "{} steps", "guidance_scale": "guidance {:g}", "guidance_interval": "guided in {}"}
    return words.get(name, "{}").format(value)


def draw(path: Path, panels: Sequence[tuple[str, str, str]], lines: dict[str, list[Row]], log: bool = False) -> Path:
    """Panels of (title, what is on the x axis, metric on the y axis) side by side."""
    plt = pyplot()
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3.6), squeeze=False, layout="constrained")
    for axis, (title, x, metric) in zip(axes[0], panels, strict=True):
        for name, rows in lines.items():
            known = sorted((row[x], row["metrics"][metric]) for row in rows if row[x] is not None)
            axis.plot(*zip(*known, strict=True) if known else ([], []), marker="o", label=name)
        axis.set(title=title, xlabel=x.replace("_", " "))
        if log:
            axis.set_xscale("log")
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
