"""Handwritten digits: scikit-learn's 1,797 real 8x8 scans as a latent store, to run everything in minutes."""

from pathlib import Path

import torch
from torch import Tensor

from ditlit.data.datamodule import LatentDataModule
from ditlit.data.manifest import MANIFEST
from ditlit.data.store import write_store
from ditlit.errors import InputError

NUM_VAL = 360


def load_digits() -> tuple[Tensor, Tensor]:
    """All digits as pixels (1797, 1, 8, 8) in [-1, 1] and labels (1797,), in a fixed shuffled order."""
    try:
        from sklearn import datasets
    except ImportError:
        raise InputError("the digits come with scikit-learn: pip install 'ditlit[digits]'") from None
    digits = datasets.load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 8 - 1  # (n, 1, 8, 8), grey levels 0..16
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order], torch.from_numpy(digits.target)[order].long()


class DigitJudge:
    """A support vector machine that reads digits, trained on the real ones outside the validation split."""

    def __init__(self):
        from sklearn.svm import SVC

        images, labels = load_digits()
        self.svm = SVC().fit(_features(images[NUM_VAL:]), labels[NUM_VAL:].numpy())
        self.real_accuracy = self.accuracy(images[:NUM_VAL], labels[:NUM_VAL])

    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """Share of images (n, 1, 8, 8) in [-1, 1] that are read as their label (n,)."""
        return float(self.svm.score(_features(images), labels.numpy()))


def _features(images: Tensor):
    return images.flatten(1).numpy()


class DigitsDataModule(LatentDataModule):
    """Handwritten digits, written as latent stores on first use and read like any others.

    Args:
        store: folder for the stores of 1,437 training and 360 validation digits.
        global_batch_size: samples of one optimizer step, over all devices and accumulated batches.
        val_batch_size: samples of one validation batch on each device.
        predict_samples: number of samples that ``predict`` draws, every class in turn.
        seed: of the order; follows seed_everything in the command line.
    """

    def __init__(
        self,
        store: str = "data/digits",
        global_batch_size: int = 128,
        val_batch_size: int = 360,
        predict_samples: int = 100,
        seed: int = 0,
    ):
        super().__init__(
            store=str(Path(store) / "train"),
            val_store=str(Path(store) / "val"),
            global_batch_size=global_batch_size,
            val_batch_size=val_batch_size,
            flip=False,  # a mirrored 2 is no 2
            predict_samples=predict_samples,
            seed=seed,
        )

    def prepare_data(self) -> None:
        images, labels = load_digits()
        about = dict(num_classes=10, class_names=[str(i) for i in range(10)], image_size=8)
        for folder, part in ((self.store, slice(NUM_VAL, None)), (self.val_store, slice(NUM_VAL))):
            if not (Path(folder) / MANIFEST).exists():
                write_store(folder, images[part].half(), labels[part], **about)
        super().prepare_data()
