"""One way in: weights from any of the formats."""

import re
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import nn

from ditlit import hub
from ditlit.checkpoints.contents import CheckpointContents, Which, announce, build, check
from ditlit.checkpoints.formats import read_path
from ditlit.errors import InputError
from ditlit.settings import Reading

LAST = "last.ckpt"
HUB_FILES = ["model_index.json", "*.json", "transformer/*.safetensors", "diffusion_pytorch_model*.safetensors"]


class Loaded(NamedTuple):
    """A denoiser and its process as a checkpoint describes them, and what is needed to use them."""

    denoiser: nn.Module
    process: Any
    latents: dict[str, Any]
    step: int
    weights: Which
    format: str


def load(source: str | Path, weights: Literal["ema", "raw"] = "ema", **reading: Any) -> Loaded:
    """Build a denoiser and its process from weights in any format, on the CPU, in float32 and eval mode.

    Sources are our training checkpoints and safetensors files; ``.pt`` files of the released DiT weights, as they are
    or as the released code, fast-DiT and SiT save them in training; diffusers folders of a DiTTransformer2DModel or a
    DiTPipeline, or their name on the Hugging Face hub; the folder of a run, for its ``last.ckpt``; and bare weights
    under the released names or ours. No code in any of them is run, and no class built but those of ditlit and those
    that ``trust`` names. Sizes are told from the shapes where no configuration comes with the weights.

    Released weights are taken to belong to T = 1000 linear betas and, with four channels, to the paper's latents of
    stabilityai/sd-vae-ft-ema. SiT's weights have DiT's names and shapes but predict a velocity: ``process`` says so.

    Args:
        source: file, folder or hub name.
        weights: the moving average, or the weights that the optimizer held. A source with one set gives that.
        reading: ``num_heads``, ``input_size``, ``in_channels``, ``process`` and ``trust``; see
            :class:`ditlit.settings.Reading`.

    Returns:
        Model and process; what is known of its latents: ``shift`` and ``scale`` of each channel and, from the store or
        pipeline, the VAE and class names; the number of optimizer steps taken, 0 where unknown; which weights these
        are; and the format of the source.

    Raises:
        InputError: when the source is missing, damaged or foreign, naming the first key that does not fit and both
            shapes, holds no raw weights though they are asked for, or names a class that is not trusted.
    """
    contents = read(source, weights, **reading)
    trust = reading.get("trust")
    denoiser = build(contents.denoiser, trust)
    denoiser.load_state_dict(contents.state)
    process = build(contents.process, trust)
    return Loaded(denoiser.eval(), process, contents.latents, contents.step, contents.weights, contents.format)


def read(source: str | Path, weights: Literal["ema", "raw"] = "ema", **reading: Any) -> CheckpointContents:
    """What :func:`load` builds from, with arguments and errors as there; weights stay in their stored precision."""
    if weights not in ("ema", "raw"):
        raise InputError(f"weights are 'ema' or 'raw', got {weights!r}")
    settings = Reading(**reading)
    contents = read_path(found(source), weights, settings)
    check(contents, source, settings.trust)
    if weights == "raw" and contents.weights == "ema":
        raise InputError(f"{source} holds the moving average only; use weights='ema'")
    return contents


def found(source: str | Path) -> Path:
    """A file or folder: the source itself, the last checkpoint of a run's folder, or what the hub has under that name.

    Raises:
        InputError: where there is none.
    """
    path = Path(source)
    if path.is_dir():
        return last_of_run(path) or path
    if path.exists():
        return path
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(source)) or path.suffix in (".ckpt", ".pt", ".safetensors"):
        raise InputError(f"there is no checkpoint at {source}")
    from huggingface_hub import snapshot_download  # slow to import, and only needed here

    online = hub.reachable()  # without a network its client would try again for a minute
    try:
        return Path(snapshot_download(str(source), allow_patterns=HUB_FILES, local_files_only=not online))
    except Exception as error:
        gave = "gave nothing under that name" if online else "cannot be reached, nor has its cache that name"
        raise InputError(
            f"there is nothing at {source}, and the Hugging Face hub {gave} ({type(error).__name__}); give the path of "
            "a download, or a name with safetensors and a network"
        ) from error


def last_of_run(folder: Path) -> Path | None:
    """The last checkpoint in the folder of a run, or in its ``checkpoints`` folder; None where this is neither.

    Raises:
        InputError: where a run has no ``last.ckpt``.
    """
    for inside in (folder / "checkpoints", folder):
        if (inside / LAST).exists():
            announce(f"{folder} is the folder of a run: taking {inside / LAST}")
            return inside / LAST
    if (folder / "checkpoints").is_dir():
        others = ", ".join(sorted(path.name for path in (folder / "checkpoints").glob("*.ckpt"))) or "it has none"
        raise InputError(f"the run {folder} has no checkpoints/{LAST}; name one of its checkpoints: {others}")
    return None
