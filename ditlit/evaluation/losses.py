"""Whether a loss is normal: its curve over timesteps, and plain words for what is off."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from itertools import pairwise
from typing import Any

import numpy as np

STD_RANGE = (0.5, 1.6)  # of latents that the schedules suit; 1 is meant, TAESD has 0.82
SURE = 3  # standard errors that make a difference sure
UNLEARNED = 0.9  # of the mean squared error of predicting nothing
FAR_FROM_REFERENCE = 1.25
LAGGING = 1.1  # the average's loss over that of the raw weights


@dataclass
class Losses:
    """Mean squared errors of the noise or velocity, for the same samples, timesteps and noise, each (n,).

    Args:
        t: timesteps.
        right: given the samples' labels.
        null: given the null label.
        wrong: given other samples' labels; None where there is one class only.
        raw: given the samples' labels, of the raw weights; None where there are none.
        untrained: the error of predicting nothing.
    """

    t: np.ndarray
    right: np.ndarray
    null: np.ndarray
    wrong: np.ndarray | None = None
    raw: np.ndarray | None = None
    untrained: float = 1.0


@dataclass
class Latents:
    """What is known of the latents.

    Args:
        std: of x0 as the checkpoint's shift and scale make it.
        raw_std: of the raw latents.
        trained_on, stored: ``shift`` and ``scale`` in the checkpoint and in the store.
    """

    std: float
    raw_std: float
    trained_on: dict[str, list[float]]
    stored: dict[str, list[float]]


@dataclass
class AverageDistance:
    """How the moving average stands to the raw weights.

    Args:
        step: optimizer steps taken.
        distance: norm of their difference, relative to that of the raw weights.
        learned: norm of the average over that of the raw weights, of those parameters that start at zero; None where
            the raw weights are zero there too.
    """

    step: int
    distance: float
    learned: float | None


def by_timestep(t: np.ndarray, values: np.ndarray, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard error of values (n,) in the bins between the edges; NaN where a bin is empty."""
    bins = [values[(t >= low) & (t < high)] for low, high in pairwise(edges)]
    means = np.array([part.mean() if len(part) else np.nan for part in bins])
    errors = np.array([part.std(ddof=1) / len(part) ** 0.5 if len(part) > 1 else np.nan for part in bins])
    return means, errors


def findings(
    losses: Losses,
    latents: Latents,
    average: AverageDistance | None = None,
    reference: Mapping[str, Any] | None = None,
    step: int = 0,
) -> list[str]:
    """What is off, in plain words; nothing where all is well.

    Args:
        losses, latents, average: what was measured.
        reference: curve of the recipe, from :func:`reference_for`.
        step: optimizer steps taken; a run with fewer than the reference's is not compared with it.
    """
    found = [*about_latents(latents)]
    mse = float(losses.right.mean())
    if not np.isfinite(losses.right).all():
        return [*found, "the loss is NaN or Inf: the weights hold NaN, or the latents are far too large"]
    if mse > UNLEARNED * losses.untrained:
        found.append(
            f"the mean squared error is {mse:.3f}, about that of predicting nothing ({losses.untrained:g}): these "
            "weights have learned little; were the right ones loaded?"
        )
    else:
        found += about_labels(losses)
    if average is not None:
        found += about_average(average, losses)
    if reference is not None and step >= reference["step"]:
        edges = np.array(reference["edges"])
        ours, _ = by_timestep(losses.t, losses.right, edges)
        worst = int(np.nanargmax(ours / np.array(reference["mse"])))
        ratio = ours[worst] / reference["mse"][worst]
        if ratio > FAR_FROM_REFERENCE:
            found.append(
                f"at timesteps {edges[worst]:g} to {edges[worst + 1]:g} the error is {ratio:.2f} times that of "
                f"{reference['recipe']} after {reference['step']:,} steps"
            )
    return found


def about_latents(latents: Latents) -> list[str]:
    found = []
    if latents.trained_on != latents.stored:
        found.append(
            f"the checkpoint was trained on latents with {latents.trained_on}, the store has {latents.stored}: these "
            "are latents of another VAE, or one of them lacks the scaling factor"
        )
    low, high = STD_RANGE
    if not low < latents.std < high:
        advice = (
            "a scaling factor is missing, or applied twice: SD's VAEs need 0.18215, which makes about 5.5 into 1"
            if latents.std > high or latents.raw_std < 2
            else "the scale is too small for these latents"
        )
        found.append(
            f"the latents have standard deviation {latents.std:.3g} after shift and scale ({latents.raw_std:.3g} as "
            f"the VAE gives them), and noise schedules expect about 1: {advice}"
        )
    return found


def about_labels(losses: Losses) -> list[str]:
    if losses.wrong is None:  # the null label says as much as the only class does
        return []
    worse_null, sure_null = paired(losses.null, losses.right)
    worse_wrong, sure_wrong = paired(losses.wrong, losses.right)
    if worse_wrong < 0 and sure_wrong:
        return [
            f"other samples' labels give a lower error than the right ones (by {-worse_wrong:.4f}): the classes are "
            "numbered otherwise than in training"
        ]
    if not sure_wrong:
        return [
            "wrong labels give no higher error than the right ones: the labels are ignored, or the classes are "
            "numbered otherwise than in training (early in training that is normal)"
        ]
    above_wrong, sure = paired(losses.null, losses.wrong)
    if sure and above_wrong > 0:
        return [
            f"the null label gives a higher error than wrong labels do (by {above_wrong:.4f}): it was never trained; "
            "was class_dropout_prob 0, or is the null label another class? Guidance will not work"
        ]
    if not sure_null or worse_null <= 0:
        return ["the null label gives no higher error than the right labels: it is not what it was in training"]
    return []


def about_average(average: AverageDistance, losses: Losses) -> list[str]:
    if average.distance == 0:
        return [
            f"the moving average equals the raw weights to the bit after {average.step:,} steps: it is no average "
            "(decay 0), or was overwritten with them"
        ]
    if average.learned is not None and average.learned < 0.01:
        return [
            f"the moving average does not move: where weights start at zero it has {average.learned:.2%} of the raw "
            f"weights' size after {average.step:,} steps; a decay of 0.9999 in bf16 never moves, and 0.9999 needs more "
            "than 10,000 steps"
        ]
    if losses.raw is not None:
        ratio = float(losses.right.mean() / losses.raw.mean())
        worse, sure = paired(losses.right, losses.raw)
        if sure and worse > 0 and ratio > LAGGING:
            return [
                f"the moving average's error is {ratio:.2f} times that of the raw weights: it lags behind; lower the "
                "decay, use warmup, or train longer"
            ]
    return []


def paired(a: np.ndarray, b: np.ndarray) -> tuple[float, bool]:
    """Mean of a - b, and whether it is sure not to be chance."""
    difference = a - b
    error = difference.std(ddof=1) / len(difference) ** 0.5
    return float(difference.mean()), bool(abs(difference.mean()) > SURE * error)


def reference_for(denoiser: Mapping[str, Any], process: Mapping[str, Any]) -> dict[str, Any] | None:
    """The curve of a recipe that we have run with this denoiser and process, where there is one."""
    wanted = json.loads(json.dumps([denoiser, process]))  # as they come back from a file: tuples are lists there
    for file in sorted(files("ditlit.evaluation").joinpath("curves").iterdir(), key=lambda file: file.name):
        curve = json.loads(file.read_text())
        if [curve["denoiser"], curve["process"]] == wanted:
            return curve
    return None
