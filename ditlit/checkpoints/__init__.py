"""Weights in every format: our checkpoints, the released files, diffusers folders and safetensors."""

from ditlit.checkpoints.contents import Contents, build, describe
from ditlit.checkpoints.initialize import initialize
from ditlit.checkpoints.names import from_released, to_released
from ditlit.checkpoints.read import Loaded, Reading, found, load, read

__all__ = [
    "Contents",
    "Loaded",
    "Reading",
    "build",
    "describe",
    "found",
    "from_released",
    "initialize",
    "load",
    "read",
    "to_released",
]
