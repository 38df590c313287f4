"""torch.compile, block by block and in place."""

import importlib.util
import os
import shutil

import torch
from torch import nn

from ditlit.errors import InputError


def compile_blocks(denoiser: nn.Module, device: torch.device) -> None:
    """Compile the blocks of a denoiser and what is around them (all of it where it has no ``blocks``) in place:
    parameters keep their names.

    Blocks of one kind share what is compiled, so that starting takes seconds and does not grow with the depth. Each
    batch size is compiled for itself.

    Raises:
        InputError: where the compiler that ``device`` needs is not installed.
    """
    if device.type == "cpu" and not any(shutil.which(c) for c in (os.environ.get("CXX"), "g++", "clang++") if c):
        raise InputError("--model.compile needs a C++ compiler on a CPU: install g++, or set --model.compile false")
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise InputError("--model.compile needs triton on a GPU: pip install triton, or set --model.compile false")
    around = [getattr(denoiser, name) for name in ("time_embed", "final") if hasattr(denoiser, name)]
    for part in [*denoiser.blocks, *around] if hasattr(denoiser, "blocks") else [denoiser]:
        # Validation and sampling have other batch sizes: "dynamic" kernels for all of them would slow down training.
        part.compile(dynamic=False)
