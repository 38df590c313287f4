"""The datamodule: latent stores in, batches of raw latents and labels out."""

import os
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ditlit.data.manifest import Manifest
from ditlit.data.sampler import EvalOrder, TrainOrder
from ditlit.data.store import LatentStore
from ditlit.errors import InputError


class LatentDataset(Dataset):
    """Whole batches of a store, or of those of its samples that ``subset`` (n,) names."""

    def __init__(self, store: LatentStore, subset: Tensor | None = None):
        self.store = store
        self.subset = subset

    def __len__(self) -> int:
        return len(self.store) if self.subset is None else len(self.subset)

    def rows(self, index: Tensor) -> Tensor:
        return index if self.subset is None else self.subset[index]


class TrainDataset(LatentDataset):
    def __getitem__(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        index, flip = batch
        return self.store.gather(self.rows(index), flip)


class EvalDataset(LatentDataset):
    def __getitem__(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        index, valid = batch
        return self.store.gather(self.rows(index)) | {"index": index, "valid": valid}


class LabelDataset(Dataset):
    """Labels to draw samples for: every class in turn."""

    def __init__(self, num_samples: int, num_classes: int):
        self.num_samples = num_samples
        self.num_classes = num_classes

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        index, valid = batch
        return {"index": index, "labels": index % self.num_classes, "valid": valid}


class LatentDataModule(LightningDataModule):
    """Streams latents and labels from latent stores on disk.

    Training batches are dicts of raw ``moments`` (N, 2C, H, W) or ``latents`` (N, C, H, W) and ``labels`` (N,);
    validation batches also carry ``index`` (N,), the samples' numbers, and ``valid`` (N,), false for padding.

    Args:
        store: folder of the training store.
        val_store: folder of the validation store.
        val_size: without a validation store, hold out so many samples of the training store.
        global_batch_size: samples of one optimizer step, over all devices and accumulated batches.
        val_batch_size: samples of one validation batch on each device.
        flip: mirror half of the samples, the paper's only augmentation.
        predict_samples: number of samples that ``predict`` draws, every class in turn.
        num_workers: processes that read ahead. 0 is fastest while the store fits the page cache; give 4 for slow disks.
        verify: compare shards with their checksums before the first use.
        seed: of the order, the flips and the held-out samples; follows seed_everything in the command line.
    """

    def __init__(
        self,
        store: str,
        val_store: str | None = None,
        val_size: int = 0,
        global_batch_size: int = 256,
        val_batch_size: int = 64,
        flip: bool = True,
        predict_samples: int = 64,
        num_workers: int = 0,
        verify: bool = True,
        seed: int = 0,
    ):
        super().__init__()
        if val_store and val_size:
            raise InputError("val_store and val_size exclude each other: give one of them")
        self.store = store
        self.val_store = val_store
        self.val_size = val_size
        self.global_batch_size = global_batch_size
        self.val_batch_size = val_batch_size
        self.flip = flip
        self.predict_samples = predict_samples
        self.num_workers = num_workers
        self.verify = verify
        self.seed = seed
        self._resumed: dict[str, Any] = {}
        self._train: TrainDataset | None = None
        self._val: EvalDataset | None = None

    def prepare_data(self) -> None:
        """Once a machine: check the stores, so that bad data stop a run before it starts."""
        for folder in filter(None, (self.store, self.val_store)):
            store = LatentStore(folder)
            if self.verify:
                store.verify()

    def setup(self, stage: str | None = None) -> None:
        store = LatentStore(self.store)
        if not 0 <= self.val_size < len(store):
            raise InputError(f"val_size {self.val_size} leaves nothing to train on: {self.store} has {len(store)}")
        if self.val_size:
            order = torch.randperm(len(store), generator=torch.Generator().manual_seed(self.seed))
            self._val = EvalDataset(store, order[: self.val_size].sort().values)
            self._train = TrainDataset(store, order[self.val_size :].sort().values)
        else:
            self._train = TrainDataset(store)
            self._val = EvalDataset(LatentStore(self.val_store)) if self.val_store else None
        if self.val_store:
            check_same_latents(self.store, store.manifest, self.val_store, self._val.store.manifest)

    @property
    def manifest(self) -> Manifest:
        """What the training store says of its latents; known after ``setup``."""
        return self._train.store.manifest

    def train_dataloader(self) -> DataLoader:
        trainer = self.trainer
        order = TrainOrder(
            len(self._train),
            self.global_batch_size,
            trainer.world_size,
            trainer.global_rank,
            trainer.accumulate_grad_batches,
            self.seed,
            self.flip,
            next_step=lambda: trainer.global_step,
        )
        for name, value in self._order_state().items():
            if self._resumed.get(name, value) != value:
                raise InputError(
                    f"the checkpoint was trained with {name} {self._resumed[name]} and cannot continue with {value}: "
                    "the order of the samples would not be the same; set it back"
                )
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
        return {"data.global_batch_size": self.global_batch_size, "data.seed": self.seed, "samples": len(self._train)}

    def _eval_order(self, num_samples: int) -> EvalOrder:
        return EvalOrder(num_samples, self.val_batch_size, self.trainer.world_size, self.trainer.global_rank)

    def _loader(self, dataset: Dataset, order: TrainOrder | EvalOrder) -> DataLoader:
        return DataLoader(
            dataset,
            sampler=order,
            batch_size=None,  # the sampler gives whole batches, and the dataset gathers them at once
            num_workers=min(self.num_workers, os.cpu_count() or 1),
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
        )


def check_same_latents(folder: str, train: Manifest, val_folder: str, val: Manifest) -> None:
    for name in ("kind", "shape", "num_classes", "shift", "scale", "vae"):
        if getattr(train, name) != getattr(val, name):
            raise InputError(
                f"{folder} and {val_folder} hold different latents: {name} is {getattr(train, name)} and "
                f"{getattr(val, name)}; encode both the same way"
            )
