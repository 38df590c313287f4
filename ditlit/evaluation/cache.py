"""Features on disk, found again by what they are features of."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ditlit.evaluation.extraction import ranks
from ditlit.evaluation.extractors import Features

DEFAULT_FOLDER = "~/.cache/ditlit/features"
LIMIT = 50e9  # bytes kept; 50,000 images have about 1 GB


class FeatureCache:
    """Keeps the features of sets of images, so that none is extracted twice; the longest unused go first.

    Args:
        folder: of the cache, on a disk of the first process.
        limit: bytes to keep.
    """

    def __init__(self, folder: str | Path = DEFAULT_FOLDER, limit: float = LIMIT):
        self.folder = Path(folder).expanduser()
        self.limit = limit
        self._used: set[Path] = set()

    def get(
        self, identity: dict[str, Any], layers: Sequence[str], make: Callable[[Sequence[str], Path], None]
    ) -> tuple[Features, bool]:
        """Features of each layer, mapped from the disk, and whether all of them were there.

        All processes call this together; those that are not the first get no features.

        Args:
            identity: content of the images and extractor, on the first process.
            layers: wanted.
            make: writes ``LAYER.npy`` of the layers that are missing to a folder.
        """
        rank, world = ranks()
        place = self.folder / hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        missing = [layer for layer in layers if not (place / f"{layer}.npy").is_file()]
        if world > 1:
            shared = [missing]
            dist.broadcast_object_list(shared, 0)
            missing = shared[0]
        if rank != 0:
            if missing:
                make(missing, place)
            return {}, not missing
        place.mkdir(parents=True, exist_ok=True)
        self._used.add(place)
        if missing:
            with tempfile.TemporaryDirectory(dir=place, prefix=".making-") as folder:
                make(missing, Path(folder))
                for layer in missing:
                    os.replace(Path(folder) / f"{layer}.npy", place / f"{layer}.npy")
            self._prune()
        os.utime(place)
        return {layer: mapped(place / f"{layer}.npy") for layer in layers}, not missing

    def _prune(self) -> None:
        sets = sorted((path for path in self.folder.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)
        sizes = {path: sum(file.stat().st_size for file in path.glob("*.npy")) for path in sets}
        total = sum(sizes.values())
        for path in sets:
            if total <= self.limit:
                return
            if path not in self._used:
                shutil.rmtree(path, ignore_errors=True)
                total -= sizes[path]


def mapped(path: Path) -> Tensor:
    return torch.from_numpy(np.load(path, mmap_mode="c"))  # copy-on-write: torch has no read-only tensors
