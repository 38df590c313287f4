"""Curves of a run, read back from TensorBoard's event files."""

from dataclasses import dataclass
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

from ditlit.errors import InputError


@dataclass
class Curve:
    """Values of one tag by step, in order; of a step that was logged twice, by a run that went back, the last."""

    steps: list[int]
    values: list[float]


def read_curves(run: str | Path) -> dict[str, Curve]:
    """Every scalar of the event files in a run's folder, by its tag.

    Raises:
        InputError: where there are no event files.
    """
    if not any(Path(run).glob("events.out.tfevents.*")):
        raise InputError(f"there are no TensorBoard event files in {run}: is it the folder of a run?")
    events = EventAccumulator(str(run), size_guidance={SCALARS: 0})  # 0: all of them
    events.Reload()
    curves = {}
    for tag in sorted(events.Tags()["scalars"]):
        values = {event.step: event.value for event in sorted(events.Scalars(tag), key=lambda event: event.wall_time)}
        steps = sorted(values)
        curves[tag] = Curve(steps, [values[step] for step in steps])
    return curves
