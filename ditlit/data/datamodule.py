"""The datamodule: latent stores in, batches of raw latents and labels out."""

import math
import os
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ditlit.data.cache import DEFAULT_FOLDER, ShardCache
from ditlit.data.collection import StoreCollection, hold_out
from ditlit.data.datasets import EvalDataset, LabelDataset, TrainDataset
from ditlit.data.folders import is_remote
from ditlit.data.manifest import Manifest
from ditlit.data.mixture import Mixture, make_mixture
from ditlit.data.sampler import EpochByEpoch, EvalOrder, ShuffleWindows, TrainOrder
from ditlit.data.store import LatentStore, mean_latents
from ditlit.data.workers import Loader
from ditlit.errors import InputError, check_positive, counted
from ditlit.settings import Classes

REMOTE_WINDOW = 8  # shards of a shuffle where a store is remote


def check_validation(trainer: Trainer, batches: int, has_samples: bool) -> None:
    """Refuse a validation that lies beyond the ``batches`` of an epoch in which it is counted, and tell of none at all.

    Raises:
        InputError: naming the setting to change.
    """
    every = getattr(trainer, "check_val_every_n_epoch", None)
    interval = getattr(trainer, "val_check_interval", None)
    limit = getattr(trainer, "limit_train_batches", 1.0)
    batches = min(limit, batches) if isinstance(limit, int) else int(limit * batches)
    counted_in_steps = isinstance(interval, int)
    if counted_in_steps and every is not None and interval > batches and trainer.limit_val_batches:
        raise InputError(
            f"trainer.val_check_interval {interval} is counted anew in every epoch, and an epoch has "
            f"{counted(batches, 'batch')}: set --trainer.check_val_every_n_epoch null to count over epochs, or "
            f"val_check_interval to {batches} at most"
        )
    if not has_samples or (every is None and not counted_in_steps):
        return
    first = (interval if counted_in_steps else int(interval * batches)) + ((every or 1) - 1) * batches
    ends = [trainer.max_steps * trainer.accumulate_grad_batches, (trainer.max_epochs or -1) * batches]
    last = min((end for end in ends if end > 0), default=first)
    if first > last:
        rank_zero_info(
            f"This run ends after {counted(last, 'batch')}, before its first validation, after {first:,}: lower "
            "trainer.val_check_interval or check_val_every_n_epoch for one."
        )


class LatentDataModule(LightningDataModule):
    """Streams latents and labels from latent stores on disk or at URLs.

    The loaders also serve a loop of one's own: call ``prepare_data``, ``setup``, then the loader.

    Training batches are dicts of raw ``moments`` (N, 2C, H, W) or ``latents`` (N, C, H, W) and ``labels`` (N,);
    validation batches also carry ``index`` (N,), the samples' numbers, and ``valid`` (N,), false for padding.

    Args:
        store: folder or URL (s3://, gs://, hf://, http://) of the training store. A list of them is joined; a mapping
            from stores to weights mixes them: an epoch has as many samples as all stores together, shared out by
            weight.
        val_store: folder or URL of the validation store. Its classes are matched with those of the training store by
            name, and those that training lacks are left out.
        val_classes: the class of the training store that each class of the validation store is, by number or name;
            only needed where their names do not tell.
        val_size: without a validation store, hold out so many samples of the training stores.
        global_batch_size: samples of one optimizer step, over all devices and accumulated batches.
        val_batch_size: samples of one validation batch on each device.
        flip: mirror half of the samples, the paper's only augmentation.
        classes: train and validate on these classes only, a list of numbers or names, also separated by commas; they
            are numbered anew from 0 in this order. What is the name of a class is taken for the name.
        class_balanced: show every class equally often.
        shuffle_window: shuffle within so many shards at a time instead of over all samples. By default 8 where a store
            is remote, so that shards can be read ahead and dropped, and an exact shuffle where all are on disk.
        cache_dir: local folder for the shards of remote stores.
        cache_size_gb: bound of that folder in gigabytes.
        predict_samples: number of samples that ``predict`` draws, every class in turn.
        num_workers: processes that read ahead. 0 is fastest while the store fits the page cache; give 4 for slow disks.
        verify: compare shards on disk with their checksums before the first use; those of remote stores always are.
        seed: of the order, the flips and the held-out samples; follows seed_everything in the command line.
    """

    def __init__(
        self,
        store: dict[str, float] | list[str] | str,
        val_store: str | None = None,
        val_size: int = 0,
        global_batch_size: int = 256,
        val_batch_size: int = 64,
        flip: bool = True,
        classes: Classes | None = None,
        class_balanced: bool = False,
        shuffle_window: int | None = None,
        cache_dir: str = DEFAULT_FOLDER,
        cache_size_gb: float = 50.0,
        predict_samples: int = 64,
        num_workers: int = 0,
        verify: bool = True,
        seed: int = 0,
        val_classes: Classes | None = None,
    ):
        super().__init__()
        if val_store and val_size:
            raise InputError("val_store and val_size exclude each other: give one of them")
        check_positive(
            global_batch_size=global_batch_size, val_batch_size=val_batch_size, predict_samples=predict_samples
        )
        if num_workers < 0:
            raise InputError(f"num_workers is a number of processes, 0 for none, got {num_workers}")
        self.store = store
        self.locations = [store] if isinstance(store, str) else list(store)
        if not self.locations:
            raise InputError("data.store names no store; give a folder or URL")
        self.weights = list(store.values()) if isinstance(store, dict) else None
        self.val_store = val_store
        self.val_classes = val_classes
        self.val_size = val_size
        self.global_batch_size = global_batch_size
        self.val_batch_size = val_batch_size
        self.flip = flip
        self.classes = classes
        self.class_balanced = class_balanced
        self.shuffle_window = shuffle_window
        if shuffle_window is None and any(map(is_remote, self.locations)):
            self.shuffle_window = REMOTE_WINDOW
        self.cache_dir = cache_dir
        self.cache_size_gb = cache_size_gb
        self.predict_samples = predict_samples
        self.num_workers = num_workers
        self.verify = verify
        self.seed = seed
        self._cache: ShardCache | None = None
        self._resumed: dict[str, Any] = {}
        self._train: TrainDataset | None = None
        self._val: EvalDataset | None = None
        self._mixture: Mixture | None = None

    def prepare_data(self) -> None:
        """Once a machine: check the stores, so that bad data stop a run before it starts."""
        for location in (*self.locations, self.val_store):
            if location is not None and not is_remote(location):
                store = LatentStore(location)
                if self.verify:
                    store.verify()

    def setup(self, stage: str | None = None) -> None:
        if any(is_remote(location) for location in (*self.locations, self.val_store) if location is not None):
            self._cache = ShardCache(self.cache_dir, self.cache_size_gb)
        store = StoreCollection([LatentStore(location, self._cache) for location in self.locations], self.classes)
        num_samples = len(store) if store.rows is None else len(store.rows)
        if not 0 <= self.val_size < num_samples:
            raise InputError(f"val_size {self.val_size} leaves nothing to train on: {self.store} has {num_samples}")
        if self.val_size:
            rows = torch.arange(len(store)) if store.rows is None else store.rows
            shard_of = None if self.shuffle_window is None else store.shard_of[rows]
            generator = torch.Generator().manual_seed(self.seed)
            train, val = hold_out(rows, self.val_size, generator, shard_of)
            self._train, self._val = TrainDataset(store, train), EvalDataset(store, val)
        else:
            self._train, self._val = TrainDataset(store, store.rows), None
        if self.val_store:
            val_store = StoreCollection([LatentStore(self.val_store, self._cache)])
            val_store.number_as(store, "data.val_classes", self.val_classes)
            self._val = EvalDataset(val_store, val_store.rows)
        self._mixture = None
        if self.weights is not None or self.class_balanced:
            labels = self._train.pick(store.labels) if self.class_balanced else None
            store_of = self._train.pick(store.store_of)
            self._mixture = make_mixture(store_of, self.weights, labels, store.manifest.num_classes)
        self._check_cache()

    def teardown(self, stage: str | None = None) -> None:
        if self._cache is not None:
            self._cache.close()

    @property
    def manifest(self) -> Manifest:
        """What the training stores say of the latents and the chosen classes; known after ``setup``."""
        return self._train.store.manifest

    def examples(self, label: int, n: int) -> Tensor | None:
        """The first n training samples of a class, or as many as there are, as the VAE gives them (n, C, H, W).

        None where there are none, or a store is remote: every class would have shards fetched.
        """
        store = self._train.store
        rows = (self._train.pick(store.labels) == label).nonzero().flatten()[:n]
        if len(rows) == 0 or any(part.cache is not None for part in store.stores):
            return None
        return mean_latents(store.gather(self._train.rows(rows)))

    @property
    def _ranks(self) -> tuple[int, int]:
        """Number of processes and which of them this is; without a trainer there is one."""
        return (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)

    def train_dataloader(self) -> DataLoader:
        """Batches without end from the trainer's step on; without a trainer, another epoch each time it is iterated."""
        trainer = self.trainer
        windows = None
        if self.shuffle_window is not None:
            store = self._train.store
            windows = ShuffleWindows(self._train.pick(store.shard_of), self.shuffle_window, store.prefetch)
        order = TrainOrder(
            len(self._train),
            self.global_batch_size,
            *self._ranks,
            1 if trainer is None else trainer.accumulate_grad_batches,
            self.seed,
            self.flip,
            next_step=lambda: 0 if trainer is None else trainer.global_step,
            mixture=self._mixture,
            windows=windows,
        )
        if trainer is None:
            return self._loader(self._train, EpochByEpoch(order))
        now = self._order_state()
        for name in (now | self._resumed) if self._resumed else ():
            if self._resumed.get(name) != now.get(name):
                raise InputError(
                    f"the checkpoint was trained with {name} {self._resumed.get(name)} and cannot continue with "
                    f"{now.get(name)}: the order of the samples would not be the same; set it back"
                )
        check_validation(trainer, len(order), self._val is not None)
        return self._loader(self._train, order)

    def val_dataloader(self) -> DataLoader | list:
        if self._val is None:
            return []
        return self._loader(self._val, self._eval_order(len(self._val)))

    def test_dataloader(self) -> DataLoader | list:
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader:
        dataset = LabelDataset(self.predict_samples, self.manifest.num_classes)
        return self._loader(dataset, self._eval_order(self.predict_samples))

    def state_dict(self) -> dict[str, Any]:
        """What the order of the samples depends on; where in it the run stands is the trainer's global step."""
        return self._order_state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resumed = state_dict

    def _order_state(self) -> dict[str, Any]:
        """Settings at their defaults are left out, as in checkpoints that are older than a setting."""
        state = {"data.global_batch_size": self.global_batch_size, "data.seed": self.seed, "samples": len(self._train)}
        if len(self.locations) > 1:
            state["samples of each store"] = [len(store) for store in self._train.store.stores]
        if self.weights is not None:
            state["data.store with the weights"] = self.weights
        if self.classes is not None:
            state["data.classes"] = self._train.store.classes
        if self.class_balanced:
            state["data.class_balanced"] = True
        if self.shuffle_window is not None:
            state["data.shuffle_window"] = self.shuffle_window
            state["shards"] = len(self._train.store.manifest.shards)
        return state

    def _check_cache(self) -> None:
        """Refuse a cache that would fetch the same shards again and again."""
        if self._cache is None:
            return
        sizes = self._train.remote_bytes()
        needed = sum(sizes[: 2 * self.shuffle_window]) if self.shuffle_window else 0
        if self._val is not None:
            needed += sum(self._val.remote_bytes()[:1])
        if needed > self._cache.num_bytes:
            raise InputError(
                f"cache_size_gb {self.cache_size_gb:g} cannot hold what is needed at a time, two windows of "
                "shuffle_window shards and a shard of validation; "
                f"set it to {1.01 * needed / 1e9:.3g} at least, or lower shuffle_window"
            )

    def _eval_order(self, num_samples: int) -> EvalOrder:
        return EvalOrder(num_samples, self.val_batch_size, *self._ranks)

    def _loader(self, dataset: Dataset, order: TrainOrder | EvalOrder | EpochByEpoch) -> DataLoader:
        numbers = math.prod(self.manifest.shape) * (2 if self.manifest.kind == "moments" else 1)
        return Loader(
            dataset,
            sampler=order,  # it gives whole batches, and the dataset gathers them at once
            num_workers=min(self.num_workers, os.cpu_count() or 1),
            batch_bytes=order.batch_size * (4 * numbers + 3 * 8),  # at most float32; labels, index, valid
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
        )
