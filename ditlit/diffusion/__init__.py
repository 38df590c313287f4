"""Diffusion mathematics: knows no model class and no Lightning."""

from ditlit.diffusion.flow import RectifiedFlow
from ditlit.diffusion.gaussian import GaussianDiffusion
from ditlit.diffusion.guidance import ClassifierFreeGuidance
from ditlit.diffusion.process import Denoiser, Prediction, Process
from ditlit.diffusion.samplers import ddim, ddpm
from ditlit.diffusion.sampling import draw_samples
from ditlit.settings.sampling import Sampling

__all__ = [
    "ClassifierFreeGuidance",
    "Denoiser",
    "GaussianDiffusion",
    "Prediction",
    "Process",
    "RectifiedFlow",
    "Sampling",
    "ddim",
    "ddpm",
    "draw_samples",
]  # fmt: skip
