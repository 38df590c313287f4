"""ditlit: train, sample and understand Diffusion Transformers."""

__version__ = "0.1.0"
