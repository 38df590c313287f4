"""Several stores read as one, all of their classes or some."""

import difflib
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ditlit.data.manifest import Manifest, Shard
from ditlit.data.store import LatentStore
from ditlit.errors import InputError


class StoreCollection:
    """Stores of the same latents, one after another.

    Args:
        stores: at least one.
        classes: numbers or names of the classes to keep; labels are renumbered from 0 in this order.

    Raises:
        InputError: for stores of different latents or classes, or classes that they do not have.
    """

    def __init__(self, stores: Sequence[LatentStore], classes: Sequence[int | str] | None = None):
        for store in stores[1:]:
            check_same_latents(stores[0].location, stores[0].manifest, store.location, store.manifest)
        self.stores = stores
        self.manifest = stores[0].manifest
        if len(stores) > 1:
            shards = [shard for store in stores for shard in store.manifest.shards]
            flipped = all(store.manifest.flipped for store in stores)
            self.manifest = replace(self.manifest, shards=shards, flipped=flipped, labels=None)
        sizes = torch.tensor([len(store) for store in stores])
        self._starts = sizes.cumsum(0) - sizes
        self.store_of = torch.arange(len(stores)).repeat_interleave(sizes)  # (n,)
        shard_counts = torch.tensor([shard.num_samples for shard in self.manifest.shards])
        self.shard_of = torch.arange(len(shard_counts)).repeat_interleave(shard_counts)  # (n,)
        self.labels = torch.cat([store.labels for store in stores])  # (n,)
        self.rows: Tensor | None = None  # of the samples of the chosen classes; None for all
        self.classes: list[int] | None = None  # their numbers in the stores
        if classes is not None:
            self.classes = chosen = find_classes(classes, self.manifest, stores[0].location)
            numbers = torch.full((self.manifest.num_classes,), -1)
            numbers[chosen] = torch.arange(len(chosen))
            self.labels = numbers[self.labels]
            self.rows = (self.labels >= 0).nonzero().flatten()
            names = self.manifest.class_names
            names = None if names is None else [names[k] for k in chosen]
            self.manifest = replace(self.manifest, num_classes=len(chosen), class_names=names)

    def __len__(self) -> int:
        return len(self.labels)

    def gather(self, index: Tensor, flip: Tensor | None = None) -> dict[str, Tensor]:
        """The samples at ``index`` (B,), as by :meth:`LatentStore.gather`, with the labels of this collection."""
        if len(self.stores) == 1:
            return self.stores[0].gather(index, flip) | {"labels": self.labels[index]}
        store_of = self.store_of[index]
        parts, places = [], []
        for i in store_of.unique().tolist():
            place = (store_of == i).nonzero().flatten()
            flips = None if flip is None else flip[place]
            parts.append(self.stores[i].gather(index[place] - self._starts[i], flips)[self.manifest.kind])
            places.append(place)
        # Stores of different types meet in the smallest type that holds both.
        latents = torch.cat(parts)[torch.cat(places).argsort()]
        return {self.manifest.kind: latents, "labels": self.labels[index]}

    def prefetch(self, shards: Sequence[int]) -> None:
        """Fetch the shards of remote stores, by their number here, in the background."""
        remote = [self._shard(i) for i in shards]
        if wanted := [(store.folder, shard) for store, shard in remote if store.cache is not None]:
            next(store for store in self.stores if store.cache is not None).cache.prefetch(wanted)

    def remote_bytes(self, shards: Tensor) -> list[int]:
        """Sizes of those of the shards (m,) that lie in remote stores, the largest first."""
        pairs = map(self._shard, shards.tolist())
        return sorted((shard.num_bytes for store, shard in pairs if store.cache is not None), reverse=True)

    def _shard(self, number: int) -> tuple[LatentStore, Shard]:
        for store in self.stores:
            if number < len(store.manifest.shards):
                return store, store.manifest.shards[number]
            number -= len(store.manifest.shards)
        raise IndexError(number)


def find_classes(classes: Sequence[int | str], manifest: Manifest, location: str) -> list[int]:
    """Numbers of classes given by number or name.

    Raises:
        InputError: for one that the store does not have, with names like it, or that is given twice.
    """
    names = manifest.class_names
    found = []
    for given in classes:
        if isinstance(given, int):
            if not 0 <= given < manifest.num_classes:
                raise InputError(f"classes: {location} has the classes 0..{manifest.num_classes - 1}, not {given}")
            found.append(given)
        elif names is None:
            raise InputError(f"classes: {location} does not know the names of its classes; give numbers, not {given!r}")
        elif given not in names:
            near = difflib.get_close_matches(given, names, n=5) or names[:5]
            raise InputError(f"classes: {location} has no class {given!r}; it has {', '.join(map(repr, near))}, ...")
        else:
            found.append(names.index(given))
    if not found or len(set(found)) < len(found):
        raise InputError(f"classes: need at least one class and none twice, got {list(classes)}")
    return found


def hold_out(rows: Tensor, size: int, generator: torch.Generator, shard_of: Tensor | None = None) -> tuple[Tensor, ...]:
    """Split rows (n,) into those that remain and ``size`` random ones, both in order.

    With the shard of every row (n,), whole shards are held out as far as that goes, so that few have to be read.
    """
    order = torch.randperm(len(rows), generator=generator)
    if shard_of is not None:
        shards, shard = shard_of.unique(return_inverse=True)
        turn = torch.randperm(len(shards), generator=generator)
        order = order[turn[shard[order]].argsort(stable=True)]
    return rows[order[size:].sort().values], rows[order[:size].sort().values]


def check_same_latents(folder: str, manifest: Manifest, other_folder: str, other: Manifest) -> None:
    for name in ("kind", "shape", "num_classes", "shift", "scale", "vae"):
        a, b = getattr(manifest, name), getattr(other, name)
        if name == "vae":  # the same weights may lie in different places
            a, b = ((vae or {}).get("hash", vae) for vae in (a, b))
        if a != b:
            raise InputError(
                f"{folder} and {other_folder} hold different latents: {name} is {a} and {b}; encode both the same way"
            )
    if manifest.class_names and other.class_names and manifest.class_names != other.class_names:
        a, b = next((a, b) for a, b in zip(manifest.class_names, other.class_names, strict=True) if a != b)
        raise InputError(f"{folder} and {other_folder} number their classes differently: {a!r} is {b!r} in the other")
