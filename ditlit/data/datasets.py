"""Whole batches of samples at the places that an order names."""

from torch import Tensor
from torch.utils.data import Dataset

from ditlit.data.collection import StoreCollection


class LatentDataset(Dataset):
    """Whole batches of stores, or of those of their samples that ``subset`` (n,) names."""

    def __init__(self, store: StoreCollection, subset: Tensor | None = None):
        self.store = store
        self.subset = subset

    def __len__(self) -> int:
        return len(self.store) if self.subset is None else len(self.subset)

    def rows(self, index: Tensor) -> Tensor:
        return index if self.subset is None else self.subset[index]

    def pick(self, values: Tensor) -> Tensor:
        """Of values (n,) for every sample of the stores, those of this data set's samples."""
        return values if self.subset is None else values[self.subset]

    def remote_bytes(self) -> list[int]:
        """Sizes of the remote shards that hold its samples, the largest first."""
        return self.store.remote_bytes(self.pick(self.store.shard_of).unique())


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
