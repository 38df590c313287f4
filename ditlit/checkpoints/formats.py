"""The formats of weights: how each is recognised, and what reads it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from ditlit.checkpoints.contents import CheckpointContents, Which
from ditlit.checkpoints.diffusers_folders import read_pipeline, read_transformer
from ditlit.checkpoints.safetensors_files import tensors_and_entry
from ditlit.checkpoints.torch_files import from_bare, from_training, from_training_form, plain_data
from ditlit.errors import InputError
from ditlit.settings import Reading, renamed


class Opened(NamedTuple):
    """A source before it is known what it is.

    Args:
        path: of the file or folder.
        content: of a file: tensors by name, or what was given to torch.save.
        entry: of ours in the metadata of a safetensors file.
    """

    path: Path
    content: Any = None
    entry: dict[str, Any] | None = None


def opened(path: Path) -> Opened:
    """Raise InputError for a file that is missing or damaged."""
    if path.is_dir():
        return Opened(path)
    if path.suffix == ".safetensors":
        return Opened(path, *tensors_and_entry(path))
    return Opened(path, plain_data(path))


class Format(NamedTuple):
    """One format.

    Args:
        name: in words.
        recognises: whether a source is of it, where it is of none of the formats before.
        read: the source, which weights are asked for, and what it may not tell.
    """

    name: str
    recognises: Callable[[Opened], bool]
    read: Callable[[Opened, Which, Reading], CheckpointContents]


def has_weights_of_training(content: Any) -> bool:
    return isinstance(content, dict) and any(isinstance(content.get(key), dict) for key in ("ema", "model"))


FORMATS = (
    Format(
        "diffusers pipeline",
        lambda source: (source.path / "model_index.json").is_file(),
        lambda source, weights, reading: read_pipeline(source.path),
    ),
    Format(
        "diffusers transformer",
        lambda source: source.path.is_dir(),
        lambda source, weights, reading: read_transformer(source.path),
    ),
    Format(
        "ditlit safetensors",
        lambda source: source.entry is not None,
        lambda source, weights, reading: CheckpointContents(
            source.content, format="ditlit safetensors", **source.entry
        ),
    ),
    Format(
        "ditlit checkpoint",
        lambda source: isinstance(source.content, dict) and "state_dict" in source.content,
        lambda source, weights, reading: from_training(source.content, weights, source.path),
    ),
    Format(
        "training checkpoint of the released code",
        lambda source: has_weights_of_training(source.content),
        lambda source, weights, reading: from_training_form(source.content, weights, reading, source.path),
    ),
    Format(
        "weights without a configuration, under the released names or ours",
        lambda source: isinstance(source.content, dict),
        lambda source, weights, reading: from_bare(source.content, reading, source.path),
    ),
)


def read_path(path: Path, weights: Which, reading: Reading) -> CheckpointContents:
    """What a file or folder holds.

    Raises:
        InputError: where it is of none of the formats, or damaged.
    """
    source = opened(path)
    for format in FORMATS:
        if format.recognises(source):
            contents = format.read(source, weights, reading)
            return replace(contents, denoiser=renamed.in_denoiser(contents.denoiser))
    raise InputError(f"{path} is not a checkpoint: it holds a {type(source.content).__name__}")
