"""Several stores read as one, all of their classes or some."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ditlit.data.classes import ClassSet, match_classes, parse_classes
from ditlit.data.manifest import Shard
from ditlit.data.store import LatentStore
from ditlit.errors import InputError
from ditlit.settings import Classes


class StoreCollection:
    """Stores of the same latents, one after another.

    Args:
        stores: at least one.
        classes: numbers or names of the classes to keep; labels are numbered anew from 0 in this order.

    Raises:
        InputError: for stores of different latents or classes, or classes that they do not have.
    """

    def __init__(self, stores: Sequence[LatentStore], classes: Classes | None = None):
        for store in stores[1:]:
            check_same_latents(stores[0], store)
            check_same_classes(stores[0], store)
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
            names = self.manifest.class_names
            self.classes = chosen = parse_classes(classes, self.manifest.num_classes, names, stores[0].location)
            if len(set(chosen)) < len(chosen):
                raise InputError(f"classes: need at least one class and none twice, got {classes}")
            place = {number: i for i, number in enumerate(chosen)}
            numbers = [place.get(number, -1) for number in range(self.manifest.num_classes)]
            self.number_anew(numbers, len(chosen), None if names is None else [names[k] for k in chosen])

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

    @property
    def class_set(self) -> ClassSet:
        """The classes that the stores have, chosen or not."""
        manifest = self.stores[0].manifest
        return ClassSet(manifest.num_classes, manifest.class_names, self.stores[0].location)

    def number_anew(self, numbers: Sequence[int], num_classes: int, class_names: list[str] | None) -> None:
        """Give every class k the label ``numbers[k]`` of ``num_classes``, and leave out the samples where it is -1.

        Raises:
            InputError: where no sample is left.
        """
        self.labels = torch.tensor(numbers)[self.labels]
        self.rows = (self.labels >= 0).nonzero().flatten()
        if not len(self.rows):
            raise InputError(f"{self.stores[0].location} has no samples of the classes that are wanted")
        self.manifest = replace(self.manifest, num_classes=num_classes, class_names=class_names)

    def number_as(self, other: "StoreCollection", setting: str, given: Classes | None = None) -> None:
        """Take the labels of another collection, for the classes that it has; see :func:`match_classes`.

        Raises:
            InputError: where the latents are not of its kind, or it cannot be told which class is which.
        """
        check_same_latents(other.stores[0], self.stores[0])
        numbers = match_classes(self.class_set, other.class_set, setting, given)
        if other.classes is not None:
            place = {number: i for i, number in enumerate(other.classes)}
            numbers = [place.get(number, -1) for number in numbers]
        if numbers != list(range(self.manifest.num_classes)):
            self.number_anew(numbers, other.manifest.num_classes, other.manifest.class_names)

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


def check_same_latents(first: LatentStore, other: LatentStore) -> None:
    for name in ("kind", "shape", "shift", "scale", "vae"):
        a, b = getattr(first.manifest, name), getattr(other.manifest, name)
        if name == "vae":  # the same weights may lie in different places
            a, b = ((vae or {}).get("hash", vae) for vae in (a, b))
        if a != b:
            raise InputError(
                f"{first.location} and {other.location} hold different latents: {name} is {a} and {b}; encode both the "
                "same way"
            )


def check_same_classes(first: LatentStore, other: LatentStore) -> None:
    where = f"{first.location} and {other.location}"
    a, b = first.manifest, other.manifest
    if a.num_classes != b.num_classes:
        raise InputError(f"{where} have {a.num_classes} and {b.num_classes} classes; encode both with the same")
    if a.class_names and b.class_names and a.class_names != b.class_names:
        x, y = next((x, y) for x, y in zip(a.class_names, b.class_names, strict=True) if x != y)
        raise InputError(f"{where} number their classes differently: {x!r} is {y!r} in the other")
