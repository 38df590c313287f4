"""Denoisers: torch only, no knowledge of diffusion."""

from ditlit.models.dit import VARIANTS, DiT, macs, num_parameters

__all__ = ["VARIANTS", "DiT", "macs", "num_parameters"]
