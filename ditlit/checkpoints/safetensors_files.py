"""Single safetensors files: ours, which say in their metadata what they are, and bare ones."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ditlit.checkpoints.contents import CheckpointContents
from ditlit.checkpoints.foreign import unreadable
from ditlit.errors import InputError

ENTRY = "ditlit"  # of the metadata: JSON


def write_safetensors(contents: CheckpointContents, path: Path) -> None:
    """Write weights under our names, with everything else of the contents as JSON in the metadata."""
    save(contents.state, contents.about(), path)


def save(state: dict[str, Tensor], about: dict[str, Any] | None, path: Path) -> None:
    """Write tensors and our entry; ``format`` is what diffusers and transformers ask for."""
    metadata = {"format": "pt"} | ({} if about is None else {ENTRY: json.dumps(about)})
    save_file({key: value.contiguous() for key, value in state.items()}, path, metadata)


def tensors_and_entry(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """All tensors of a file, and our entry in its metadata if there is one.

    Raises:
        InputError: where the file is missing or damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            entry = (file.metadata() or {}).get(ENTRY)
            return {key: file.get_tensor(key) for key in file.keys()}, None if entry is None else json.loads(entry)  # noqa: SIM118
    except FileNotFoundError:
        raise InputError(f"there is no checkpoint at {path}") from None
    except (SafetensorError, ValueError, OSError) as error:
        raise unreadable(path, "safetensors", error) from error
