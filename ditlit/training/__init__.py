"""Training with Lightning: the module, the moving average, and what a run shows."""

from ditlit.training.activations import ActivationMaxima
from ditlit.training.checkpoint_files import CheckpointFiles
from ditlit.training.devices import FSDP2
from ditlit.training.digits import DigitsReport
from ditlit.training.ema import EMA
from ditlit.training.evaluation import SampleMetrics
from ditlit.training.heartbeat import Heartbeat
from ditlit.training.interruption import Interrupted, StopOnSignal
from ditlit.training.module import DiTModule
from ditlit.training.monitor import RunProgressBar, TrainingMonitor
from ditlit.training.pictures import SampleGrid

__all__ = [
    "EMA",
    "FSDP2",
    "ActivationMaxima",
    "CheckpointFiles",
    "DiTModule",
    "DigitsReport",
    "Heartbeat",
    "Interrupted",
    "RunProgressBar",
    "SampleGrid",
    "SampleMetrics",
    "StopOnSignal",
    "TrainingMonitor",
]
