"""The commands that are no business of Lightning's: each a function of its settings.

Nothing here imports torch; a command does when it runs.
"""

from importlib import import_module
from typing import Any

from ditlit.settings.flags import make

# Name -> its settings, and the function that takes them.
COMMANDS = {
    "encode": ("settings.encode.EncodeSettings", "commands.encode.encode"),
    "sample": ("settings.sample.SampleSettings", "commands.sample.sample"),
    "evaluate": ("settings.evaluate.EvaluateSettings", "commands.evaluate.evaluate"),
    "evaluate sweep": ("settings.evaluate.SweepSettings", "commands.evaluate_sweep.evaluate_sweep"),
    "evaluate loss": ("settings.evaluate.LossSettings", "commands.evaluate_loss.evaluate_loss"),
    "evaluate scaling": ("settings.evaluate.ScalingSettings", "commands.evaluate_scaling.evaluate_scaling"),
    "convert": ("settings.convert.ConvertSettings", "commands.convert.convert"),
}


def call(command: str, /, **settings: Any) -> None:
    """Run a command with the settings of its command line: ``call("sample", ckpt="runs/digits", out="samples")``.

    Raises:
        InputError: for a mistake in the settings, or in what they name.
    """
    function = COMMANDS[command][1]
    made = make(settings_of(command), settings)  # before torch is loaded
    found(function)(made)


def settings_of(command: str) -> type:
    """The dataclass of a command's settings."""
    return found(COMMANDS[command][0])


def found(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(import_module(f"ditlit.{module}"), name)
