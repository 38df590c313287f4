"""Names that settings and classes had before: files, commands and checkpoints that hold them are read as ever."""

import functools
import os
import sys
from typing import Any

SETTINGS = {
    "model.label_dropout": "class_dropout_prob",
    "model.denoiser.use_checkpoint": "gradient_checkpointing",
}
CLASSES = {
    f"ditlit.training.{name}": f"ditlit.{room}.{name}"
    for room, names in {
        "callbacks": "ActivationMaxima DigitsReport RunProgressBar SampleGrid SampleMetrics TrainingMonitor",
        "callbacks.curves": "RunLogger",
        "callbacks.overview": "ModelLine",
        "parallel": "FSDP2",
        "resilience": "CheckpointFiles Heartbeat StopOnSignal",
    }.items()
    for name in names.split()
}


def in_settings(settings: Any, place: str = "") -> Any:
    """Nested settings with new names.

    Args:
        place: the setting that holds these.
    """
    if isinstance(settings, list):
        return [in_settings(each, place) for each in settings]
    if not isinstance(settings, dict):
        return class_path(settings) if isinstance(settings, str) else settings
    if not str(settings.get("class_path", "ditlit.")).startswith("ditlit."):
        return settings  # of the user's own class, where a name may mean anything
    new = {}
    for name, value in settings.items():
        inside = place if name == "init_args" else f"{place}.{name}".lstrip(".")
        new[setting(inside).rpartition(".")[2] if inside in SETTINGS else name] = in_settings(value, inside)
    return new


def in_denoiser(description: dict[str, Any]) -> dict[str, Any]:
    """Class path and keywords of a denoiser, as checkpoints hold them, with new names."""
    return in_settings(description, "model.denoiser")


def setting(name: str) -> str:
    plain = name.replace(".init_args", "")
    if plain not in SETTINGS:
        return name
    new = f"{name.rpartition('.')[0]}.{SETTINGS[plain]}"
    announce(name, new)
    return new


def class_path(path: str) -> str:
    if path not in CLASSES:
        return path
    announce(path, CLASSES[path])
    return CLASSES[path]


@functools.cache
def announce(old: str, new: str) -> None:
    """Say it once, on the first process of a machine."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"ditlit: {old} is called {new} now", file=sys.stderr)
