"""Files of torch.save: our training checkpoints, and the released DiT weights with their relatives."""

import argparse
import zipfile
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ditlit.checkpoints.contents import CheckpointContents, Which, announce, as_dit
from ditlit.checkpoints.flows import turned, with_empty_variance, without_variance
from ditlit.checkpoints.foreign import unreadable
from ditlit.checkpoints.names import RELEASED, rename, to_released, unwrapped
from ditlit.checkpoints.sizes import PAPER_VAE, from_shapes
from ditlit.diffusion import RectifiedFlow
from ditlit.errors import InputError
from ditlit.models import DiT
from ditlit.models.embeddings import sincos_positions
from ditlit.settings import Reading

PREFIX = "denoiser."  # of the weights in a training checkpoint
NAMES = {"sit": "SiT", "repa": "REPA"}
PROJECTORS = "projectors."  # of REPA, to a teacher's features


def plain_data(path: str | Path) -> Any:
    """The contents of a file as plain data and tensors: no code in it is ever run."""
    try:
        # The released code keeps its command line as a Namespace, which holds plain data again.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except FileNotFoundError:
        raise InputError(f"there is no checkpoint at {path}") from None
    except Exception as error:
        raise unreadable(path, "a checkpoint", error) from error


def from_training(checkpoint: dict[str, Any], weights: Literal["ema", "raw"], where: Any) -> CheckpointContents:
    """Contents of one of our training checkpoints."""
    missing = {"state_dict", "hyper_parameters", "latents", "global_step"} - set(checkpoint)
    if missing:
        raise InputError(f"{where} is not a ditlit training checkpoint: it lacks {', '.join(sorted(missing))}")
    if "current_model_state" in checkpoint:
        which, state = weights, checkpoint["current_model_state" if weights == "raw" else "state_dict"]
    else:  # trained without a moving average, or converted
        which, state = checkpoint.get("weights", "raw"), checkpoint["state_dict"]
    settings = checkpoint["hyper_parameters"]
    return CheckpointContents(
        state={k.removeprefix(PREFIX): v for k, v in state.items() if k.startswith(PREFIX)},
        denoiser=settings["denoiser"],
        process=settings["process"],
        latents=checkpoint["latents"],
        step=checkpoint["global_step"],
        weights=which,
        format="ditlit checkpoint",
    )


def from_training_form(
    content: dict[str, Any], weights: Literal["ema", "raw"], reading: Reading, where: Any
) -> CheckpointContents:
    """Contents of what the released code and its relatives save in training: ``model``, ``ema``, ``opt``, ``args``."""
    key = "model" if weights == "raw" else "ema"
    if not isinstance(content.get(key), dict):
        raise InputError(f"{where} has no {key!r} weights; it holds {', '.join(map(repr, content))}")
    vae = getattr(content.get("args"), "vae", None)
    vae = f"stabilityai/sd-vae-ft-{vae}" if vae in ("ema", "mse") else PAPER_VAE
    return from_bare(content[key], reading, where, weights, vae)


def from_bare(
    state: dict[str, Tensor], reading: Reading, where: Any, weights: Which = "unknown", vae: str = PAPER_VAE
) -> CheckpointContents:
    """Contents of weights under the released names or ours, without a configuration."""
    state = unwrapped(state)
    foreign = next((key for key, value in state.items() if not isinstance(value, Tensor)), None)
    if foreign is not None or not state:
        raise InputError(f"{where} holds no weights of a DiT" + (f": {foreign!r} is no tensor" if state else ""))
    format, process = "bare ditlit weights", None
    if "patch_embed.weight" not in state:
        format = "released weights"
        kind = reading.process or ("repa" if any(key.startswith(PROJECTORS) for key in state) else "ddpm")
        positions = {key: value for key, value in state.items() if key == "pos_embed"}
        left_out = ("pos_embed", PROJECTORS) if kind == "repa" else ("pos_embed",)
        rest = {key: value for key, value in state.items() if not key.startswith(left_out)}
        try:
            state = rename(rest, RELEASED, "the released DiT weights") | positions
        except InputError as error:
            raise InputError(f"{where} holds no DiT that ditlit knows: {error}") from None
        if kind != "ddpm":
            format, process = f"released weights of {NAMES[kind]}", RectifiedFlow()
            state = from_flow(state, kind, where)
    return from_shapes(state, reading, where, weights, format, vae, process)


def from_flow(state: dict[str, Tensor], kind: Literal["sit", "repa"], where: Any) -> dict[str, Tensor]:
    """Weights of SiT or REPA, under our names, as those of our flow."""
    weight = state["patch_embed.weight"]  # (D, C, p, p)
    channels, rows = weight.shape[1], state["final.linear.weight"].shape[0]
    if rows == 2 * channels * weight.shape[2] * weight.shape[3]:
        announce(f"{where}: the second half of the outputs, which these models never train, is dropped")
        state = without_variance(state, channels)
    return turned(state) if kind == "sit" else state


def write_training(contents: CheckpointContents, path: Path) -> None:
    """Write a checkpoint with one set of weights, and no optimizer to train on with."""
    torch.save(
        {
            "pytorch-lightning_version": version("lightning"),
            "epoch": 0,
            "global_step": contents.step,
            "state_dict": {PREFIX + key: value.contiguous() for key, value in contents.state.items()},
            "hyper_parameters": {
                "_instantiator": "lightning.pytorch.cli.instantiate_module",
                "denoiser": contents.denoiser,
                "process": contents.process,
            },
            "latents": contents.latents,
            "weights": contents.weights,
        },
        path,
    )


def write_released(contents: CheckpointContents, path: Path) -> None:
    """Write bare weights under the released names.

    Raises:
        InputError: for what the released format cannot hold.
    """
    torch.save(released(contents, as_dit(contents, "the released format")), path)


def write_sit(contents: CheckpointContents, path: Path) -> None:
    """Write bare weights as SiT has them: asked with 1 - t, and with zeros for outputs that it never trains.

    Raises:
        InputError: for what that format cannot hold.
    """
    model = as_dit(contents, "SiT's format", RectifiedFlow)
    if contents.process["init_args"]["prediction"] != "velocity" or model.out_channels != model.in_channels:
        raise InputError("SiT's format holds models that predict a velocity and nothing else")
    state = with_empty_variance(turned(contents.state), model.in_channels)
    torch.save(released(replace(contents, state=state), model), path)


def released(contents: CheckpointContents, model: DiT) -> dict[str, Tensor]:
    """Weights under the released names, with the table of positions."""
    height, width = model.input_size
    if height != width:
        raise InputError(
            f"the released format knows square latents only, not {height}x{width}; write safetensors or a ckpt"
        )
    if isinstance(model.pos_embed, nn.Parameter):
        positions = contents.state["pos_embed"]
    else:
        positions = sincos_positions(model.config["hidden_size"], model.grid).to(
            contents.state["patch_embed.weight"].dtype
        )
    state = to_released(contents.state, model.patch_size, positions)
    return {key: value.contiguous() for key, value in state.items()}
