"""Features on disk, found again by what they are features of."""

import contextlib
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ditlit.data.folders import check_writable
from ditlit.errors import InputError
from ditlit.evaluation.extraction import ranks
from ditlit.evaluation.extractors import Features
from ditlit.settings.evaluate import FEATURES

LIMIT = 50e9  # bytes kept; 50,000 images have about 1 GB


class FeatureCache:
    """Keeps the features of sets of images, so that none is extracted twice; the longest unused go first.

    A folder that cannot be written costs a warning, and features are kept for as long as the cache object lives.

    Args:
        folder: of the cache, on a disk of the first process.
        limit: bytes to keep.
    """

    def __init__(self, folder: str | Path = FEATURES, limit: float = LIMIT):
        self.folder = folder
        self.limit = limit
        self._own: tempfile.TemporaryDirectory | None = None  # where the folder cannot be written
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
        name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        found = {layer: path for layer in layers if (path := self._find(name, layer)) is not None}
        missing = [layer for layer in layers if layer not in found]
        if world > 1:
            shared = [missing]
            dist.broadcast_object_list(shared, 0)
            missing = shared[0]
        if rank != 0:
            if missing:
                make(missing, Path())
            return {}, not missing
        if missing:
            place = self._writable(name)
            with tempfile.TemporaryDirectory(dir=place, prefix=".making-") as making:
                make(missing, Path(making))
                for layer in missing:
                    found[layer] = place / f"{layer}.npy"
                    os.replace(Path(making) / f"{layer}.npy", found[layer])
        for place in {path.parent for path in found.values()}:
            self._used.add(place)
            with contextlib.suppress(OSError):  # of another user's cache
                os.utime(place)
        if missing:
            self._prune(place.parent)
        return {layer: mapped(found[layer]) for layer in layers}, not missing

    def _find(self, name: str, layer: str) -> Path | None:
        folders = [self.folder, *([] if self._own is None else [self._own.name])]
        files = [Path(os.path.expanduser(folder), name, f"{layer}.npy") for folder in folders]
        return next((file for file in files if os.access(file, os.R_OK)), None)

    def _writable(self, name: str) -> Path:
        """The place of a set in the folder, or where that cannot be written, in one that lives as long as this object.

        Once there is such a folder, it is used for all sets.
        """
        if self._own is None:
            try:
                place = Path(self.folder).expanduser() / name
                check_writable(place, "cache")
                return place
            except (InputError, RuntimeError) as problem:  # RuntimeError: this user has no home
                print(f"ditlit: warning: {problem}. Features are not kept this time.", file=sys.stderr)
                self._own = tempfile.TemporaryDirectory(prefix="ditlit-features-", ignore_cleanup_errors=True)
        place = Path(self._own.name) / name
        place.mkdir(exist_ok=True)
        return place

    def _prune(self, folder: Path) -> None:
        sets = sorted((path for path in folder.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)
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
