"""``ditlit evaluate scaling``: quality against compute, from runs that were made."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from ditlit import checkpoints
from ditlit.analysis.curves import read_curves
from ditlit.commands.evaluate_sweep import begin, name_of, record, run_point, sampling_of, write_table
from ditlit.data.folders import SHOWN, write_atomically, writing
from ditlit.errors import InputError
from ditlit.evaluation.plots import plot_scaling
from ditlit.models import DiT, macs, num_parameters
from ditlit.settings.evaluate import ScalingSettings


def evaluate_scaling(settings: ScalingSettings) -> None:
    """See :class:`ScalingSettings`."""
    found = {path.parents[1].name: path for path in sorted(Path(settings.runs).glob("*/checkpoints/last.ckpt"))}
    if not found:
        raise InputError(f"{settings.runs} holds no runs: there is no */checkpoints/last.ckpt below it")
    costs = {name: cost_of(path) for name, path in found.items()}
    folder, point = Path(settings.out), settings.sampling
    begin(folder, record(settings) | asdict(point) | {"point": name_of(point)}, ("scaling.png", "scaling.json"))
    rows = []
    for number, (name, cost) in enumerate(sorted(costs.items(), key=lambda item: item[1]["gmacs"]), 1):
        print(f"model {number} of {len(costs)}: {name}, step {cost['step']:,}", flush=True)
        drawn = folder / "models" / f"{name}-{cost['step']:08d}"
        result = run_point(sampling_of(settings, str(found[name]), point), settings, drawn, keep_images=False)
        rows.append({"model": name} | cost | {"metrics": result["metrics"]})
        text = write_tables(rows, folder)
    print(text)
    with writing(folder, SHOWN):
        picture = plot_scaling(rows, folder / "scaling.png")
    print(f"Look at {picture}")


def cost_of(checkpoint: Path) -> dict[str, Any]:
    """What a run's model and training took, and its held-out loss as it went.

    ``gmacs`` is 10^9 multiply-adds of a forward pass of one sample, ``pflops`` 10^15 FLOPs of all training steps: two
    a multiply-add, and three forward passes for a forward and a backward one. ``hours`` are those of the steps alone.

    Raises:
        InputError: where the run's configuration or curves are missing, or the model is no DiT.
    """
    run = checkpoint.parents[1]
    loaded = checkpoints.load(str(checkpoint))
    if not isinstance(loaded.denoiser, DiT):
        raise InputError(f"{checkpoint} holds a {type(loaded.denoiser).__name__}: the multiply-adds of a DiT are known")
    try:
        config = yaml.safe_load((run / "config.yaml").read_text())
        batch = config["data"]["init_args"]["global_batch_size"]
    except (OSError, KeyError, TypeError, yaml.YAMLError):
        raise InputError(
            f"{run / 'config.yaml'} does not say global_batch_size: is {run} the folder of a run?"
        ) from None
    curves = read_curves(run)
    for tag in ("val/loss", "throughput/images_seen", "throughput/images_per_second"):
        if tag not in curves:
            raise InputError(f"the event files in {run} have no curve {tag}; train with a TrainingMonitor and val_size")
    forward = macs(loaded.denoiser)
    flops_of_step = 6 * forward * batch
    seen, rates = (curves[f"throughput/{name}"].values for name in ("images_seen", "images_per_second"))
    seconds = sum((b - a) / rate for a, b, rate in zip([0, *seen], seen, rates, strict=False))
    loss = curves["val/loss"]
    return {
        "step": loaded.step,
        "parameters": num_parameters(loaded.denoiser),
        "gmacs": forward / 1e9,
        "pflops": flops_of_step * loaded.step / 1e15,
        "hours": seconds / 3600,
        "val_loss": loss.values[-1],
        "losses": [[flops_of_step * step / 1e15, value] for step, value in zip(loss.steps, loss.values, strict=True)],
    }


def write_tables(rows: list[dict[str, Any]], folder: Path) -> str:
    """``table.csv``, ``table.md`` and ``scaling.json``, a row for each model; returns the text of the second."""
    columns = ["model", "parameters", "gmacs", "step", "pflops", "hours", "val_loss"]
    names = list(rows[0]["metrics"])
    lines = [[row[name] for name in columns] + [row["metrics"][name] for name in names] for row in rows]
    heads = ["model", "parameters", "multiply-adds (G)", "steps", "training (PFLOP)", "hours", "held-out loss", *names]
    shown = [
        [model, f"{parameters / 1e6:.1f} M", f"{gmacs:.3f}", f"{step:,}", f"{pflops:.3g}", f"{hours:.2f}",
         f"{loss:.4f}", *(f"{value:.4g}" for value in values)]
        for model, parameters, gmacs, step, pflops, hours, loss, *values in lines
    ]  # fmt: skip
    text = write_table(folder, columns + names, lines, heads, shown)
    with writing(folder / "scaling.json", SHOWN):
        write_atomically(folder / "scaling.json", json.dumps(rows, indent=1).encode())
    return text
