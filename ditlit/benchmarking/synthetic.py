"""Latents that stand in for a store that is not there: what a step costs does not depend on their values."""

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

ENDLESS = 2**30


class OneBatch(Dataset):
    """The same batch again and again."""

    def __init__(self, batch: dict[str, Tensor]):
        self.batch = batch

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.batch


class SyntheticLatents(LightningDataModule):
    """Normal latents (N, C, H, W) and labels (N,) in memory.

    Args:
        shape: (C, H, W) of the latents.
        num_classes: number of classes.
        batch_size: samples N of a micro-batch.
    """

    def __init__(self, shape: tuple[int, int, int], num_classes: int, batch_size: int):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(batch_size, *shape, generator=generator)
        self.batch = {"latents": latents, "labels": torch.arange(batch_size) % num_classes}

    def train_dataloader(self) -> DataLoader:
        return DataLoader(OneBatch(self.batch), batch_size=None, pin_memory=torch.cuda.is_available())
