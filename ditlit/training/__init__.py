"""Training with Lightning: the module, its random numbers and the moving average of its weights."""

from ditlit.training.ema import EMA
from ditlit.training.module import DiTModule

__all__ = ["EMA", "DiTModule"]
