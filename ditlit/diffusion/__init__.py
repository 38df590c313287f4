"""Diffusion mathematics: knows no model class and no Lightning."""

from ditlit.diffusion.gaussian import GaussianDiffusion, Prediction
from ditlit.diffusion.guidance import Guided
from ditlit.diffusion.sampling import Sampling, ddim, ddpm

__all__ = ["GaussianDiffusion", "Guided", "Prediction", "Sampling", "ddim", "ddpm"]
