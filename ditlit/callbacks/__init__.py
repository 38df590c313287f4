"""What a run shows of itself. Without any of these it learns the same."""

from ditlit.callbacks.activations import ActivationMaxima
from ditlit.callbacks.digits import DigitsReport
from ditlit.callbacks.evaluation import SampleMetrics
from ditlit.callbacks.monitor import RunProgressBar, TrainingMonitor
from ditlit.callbacks.pictures import SampleGrid

__all__ = ["ActivationMaxima", "DigitsReport", "RunProgressBar", "SampleGrid", "SampleMetrics", "TrainingMonitor"]
