"""ditlit: train, sample and understand Diffusion Transformers."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# What programs use, and where it is; imported when it is first asked for, since torch takes seconds.
EXPORTS = {
    "load": "generation.model",
    "DiT": "models",
    "GaussianDiffusion": "diffusion",
    "RectifiedFlow": "diffusion",
    "Sampling": "settings",
    "DiTModule": "training",
    "EMA": "training",
    "SampleGrid": "callbacks",
    "LatentDataModule": "data",
    "LatentStore": "data.store",
    "write_store": "data",
    "InputError": "errors",
}
__all__ = [*EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in EXPORTS:
        raise AttributeError(f"module 'ditlit' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"ditlit.{EXPORTS[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *EXPORTS})
