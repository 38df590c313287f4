"""Checkpoints: reading our own, and mapping the key names of the released DiT weights to ours and back."""

import re
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ditlit.errors import InputError

# (released name, our name), matched against whole keys.
KEY_NAMES = [
    (r"x_embedder\.proj\.(weight|bias)", r"patch_embed.\1"),
    (r"t_embedder\.mlp\.(\d\.\w+)", r"time_embed.mlp.\1"),
    (r"y_embedder\.embedding_table\.weight", r"label_embed.weight"),
    (r"blocks\.(\d+)\.attn\.qkv\.(\w+)", r"blocks.\1.attn.qkv.\2"),
    (r"blocks\.(\d+)\.attn\.proj\.(\w+)", r"blocks.\1.attn.out.\2"),
    (r"blocks\.(\d+)\.mlp\.fc1\.(\w+)", r"blocks.\1.mlp.fc_in.\2"),
    (r"blocks\.(\d+)\.mlp\.fc2\.(\w+)", r"blocks.\1.mlp.fc_out.\2"),
    (r"blocks\.(\d+)\.adaLN_modulation\.1\.(\w+)", r"blocks.\1.modulation.\2"),
    (r"final_layer\.adaLN_modulation\.1\.(\w+)", r"final.modulation.\1"),
    (r"final_layer\.linear\.(\w+)", r"final.linear.\1"),
]


def from_released(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename released DiT weights to ours.

    The patch embedding is a convolution there and a linear layer here; the fixed position table is dropped, since it is
    computed from the sizes.

    Raises:
        InputError: for a key that no released DiT has.
    """
    ours = {}
    for key, value in state.items():
        if key == "pos_embed":
            continue
        for released, name in KEY_NAMES:
            if match := re.fullmatch(released, key):
                ours[match.expand(name)] = value.flatten(1) if key == "x_embedder.proj.weight" else value
                break
        else:
            raise InputError(f"{key!r} is not a key of the released DiT weights")
    return ours


class Loaded(NamedTuple):
    """A denoiser and its process as a checkpoint describes them, and what is needed to use them."""

    denoiser: nn.Module
    process: Any
    latents: dict[str, Any]
    step: int


def load(path: str | Path, weights: Literal["ema", "raw"] = "ema") -> Loaded:
    """Build the denoiser and the process from one of our training checkpoints, on the CPU, in eval mode.

    Args:
        path: a ``.ckpt`` file written by ``fit``.
        weights: the moving average, or the weights that the optimizer holds.

    Returns:
        Model and process; what it knows of its latents: ``shift`` and ``scale`` of each channel and, from the store it
        was trained on, the VAE and class names; and the number of optimizer steps taken.

    Raises:
        InputError: when the file is missing, is not such a checkpoint, or has no separate raw weights.
    """
    checkpoint = read(path)
    if weights == "raw" and "current_model_state" not in checkpoint:
        raise InputError(f"{path} was trained without the EMA callback: it has one set of weights, use weights='ema'")
    state = checkpoint["current_model_state" if weights == "raw" else "state_dict"]
    settings = checkpoint["hyper_parameters"]
    denoiser = build(settings["denoiser"])
    prefix = "denoiser."
    denoiser.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    return Loaded(
        denoiser.eval(),
        build(settings["process"]),
        checkpoint["latents"],
        checkpoint["global_step"],
    )


def read(path: str | Path) -> dict[str, Any]:
    """The contents of one of our checkpoints, as plain data and tensors: no code in it is ever run."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise InputError(f"there is no checkpoint at {path}") from None
    except Exception as error:
        raise InputError(f"{path} cannot be read as a checkpoint; it may be truncated or foreign: {error}") from error
    missing = {"state_dict", "hyper_parameters", "latents", "global_step"} - set(checkpoint)
    if missing:
        raise InputError(f"{path} is not a ditlit training checkpoint: it lacks {', '.join(sorted(missing))}")
    return checkpoint


def describe(instance: Any) -> dict[str, Any]:
    """Class path and constructor keywords of a denoiser or process, as in a configuration file."""
    cls = type(instance)
    return {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": instance.config}


def build(description: dict[str, Any]) -> Any:
    """The inverse of :func:`describe`, for classes of this package: a checkpoint must not choose what code to run.

    Raises:
        InputError: for any other class.
    """
    module, _, name = description["class_path"].rpartition(".")
    if module.split(".")[0] != "ditlit":
        raise InputError(f"the checkpoint names {description['class_path']}, which is no class of ditlit")
    return getattr(import_module(module), name)(**description["init_args"])
