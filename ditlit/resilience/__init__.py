"""What lets a run survive the night: whole checkpoints, signals, bad steps, and going on from where it was."""

from ditlit.resilience.checkpoint_files import CheckpointFiles
from ditlit.resilience.heartbeat import Heartbeat
from ditlit.resilience.interruption import Interrupted, StopOnSignal

__all__ = ["CheckpointFiles", "Heartbeat", "Interrupted", "StopOnSignal"]
