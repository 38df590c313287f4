"""One way in: weights from any of the formats."""

import re
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import nn

from ditlit.checkpoints.contents import Contents, Which, build
from ditlit.checkpoints.diffusers_folders import read_folder
from ditlit.checkpoints.safetensors_files import read_safetensors
from ditlit.checkpoints.sizes import Given
from ditlit.checkpoints.torch_files import read_torch
from ditlit.errors import InputError

HUB_FILES = ["model_index.json", "*.json", "transformer/*.safetensors", "diffusion_pytorch_model*.safetensors"]


class Loaded(NamedTuple):
    """A denoiser and its process as a checkpoint describes them, and what is needed to use them."""

    denoiser: nn.Module
    process: Any
    latents: dict[str, Any]
    step: int
    weights: Which
    format: str


def load(
    source: str | Path,
    weights: Literal["ema", "raw"] = "ema",
    num_heads: int | None = None,
    input_size: int | tuple[int, int] | None = None,
    in_channels: int | None = None,
) -> Loaded:
    """Build a denoiser and its process from weights in any format, on the CPU, in float32 and eval mode.

    Sources are our training checkpoints and safetensors files; ``.pt`` files of the released DiT weights, as they are
    or as the released code, fast-DiT and SiT save them in training; diffusers folders of a DiTTransformer2DModel or a
    DiTPipeline, or their name on the Hugging Face hub; and bare weights under the released names or ours. No code in
    any of them is run. Sizes are told from the shapes where no configuration comes with the weights.

    Released weights are taken to belong to T = 1000 linear betas and, with four channels, to the paper's latents of
    stabilityai/sd-vae-ft-ema. SiT's weights have DiT's names and shapes but predict a velocity: train from them, do
    not sample.

    Args:
        source: file, folder or hub name.
        weights: the moving average, or the weights that the optimizer held. A source with one set gives that.
        num_heads: attention heads, for bare weights whose width is none of the paper's.
        input_size: side, or height and width, of the latents, for bare weights without a square position table.
        in_channels: channels of the latents, for bare weights under our names; 4 by default.

    Returns:
        Model and process; what is known of its latents: ``shift`` and ``scale`` of each channel and, from the store or
        pipeline, the VAE and class names; the number of optimizer steps taken, 0 where unknown; which weights these
        are; and the format of the source.

    Raises:
        InputError: when the source is missing, damaged or foreign, naming the first key that does not fit and both
            shapes, or holds no raw weights though they are asked for.
    """
    contents = read(source, weights, num_heads, input_size, in_channels)
    denoiser = build(contents.denoiser)
    denoiser.load_state_dict(contents.state)
    process = build(contents.process)
    return Loaded(denoiser.eval(), process, contents.latents, contents.step, contents.weights, contents.format)


def read(
    source: str | Path,
    weights: Literal["ema", "raw"] = "ema",
    num_heads: int | None = None,
    input_size: int | tuple[int, int] | None = None,
    in_channels: int | None = None,
) -> Contents:
    """What :func:`load` builds from, with arguments and errors as there; weights stay in their stored precision."""
    path = found(source)
    given = Given(num_heads, input_size, in_channels)
    if path.is_dir():
        contents = read_folder(path)
    elif path.suffix == ".safetensors":
        contents = read_safetensors(path, given)
    else:
        contents = read_torch(path, weights, given)
    if weights == "raw" and contents.weights == "ema":
        raise InputError(f"{source} holds the moving average only; use weights='ema'")
    return contents


def found(source: str | Path) -> Path:
    """A file or folder: the source itself, or what the hub has under that name."""
    path = Path(source)
    if path.exists():
        return path
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(source)) or path.suffix in (".ckpt", ".pt", ".safetensors"):
        raise InputError(f"there is no checkpoint at {source}")
    from huggingface_hub import snapshot_download  # slow to import, and only needed here

    try:
        return Path(snapshot_download(str(source), allow_patterns=HUB_FILES))
    except Exception as error:
        raise InputError(
            f"there is nothing at {source}, and the Hugging Face hub gave nothing under that name "
            f"({type(error).__name__}); give the path of a download, or a name with safetensors and a network"
        ) from error
