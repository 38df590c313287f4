"""Weights in every format: our checkpoints, the released files, diffusers folders and safetensors."""

from ditlit.checkpoints.contents import CheckpointContents, build, describe
from ditlit.checkpoints.initialize import initialize
from ditlit.checkpoints.names import from_released, to_released
from ditlit.checkpoints.read import Loaded, found, load, read

__all__ = [
    "CheckpointContents",
    "Loaded",
    "build",
    "describe",
    "found",
    "from_released",
    "initialize",
    "load",
    "read",
    "to_released",
]
