"""How good samples are, for tables over settings: a distance, precision, recall, and digits that can be read."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ditlit.data.digits import DigitJudge
from ditlit.evaluation import Features, frechet_distance, load_extractor, precision_recall
from ditlit.evaluation.extraction import shared_features
from ditlit.evaluation.statistics import statistics_of

PIXELS = "ditlit.analysis.quality.Pixels"


class Pixels(nn.Module):
    """An extractor for tiny pictures: the pixels themselves, (N, 3 H W). Distances between them are no FID."""

    name = "pixels"
    layers = ("pool",)
    resize = "none"

    def forward(self, images: Tensor, layers: Sequence[str]) -> Features:
        return {"pool": images.flatten(1).float() / 127.5 - 1}


class Quality:
    """Compares samples with real pictures.

    Args:
        real: bytes (n, 1 or 3, H, W).
        extractor: as for ``ditlit evaluate``, or :data:`PIXELS`.
        judge: reads digits; None where the pictures are none.
        batch_size: pictures in the extractor at once.
        device: of the extractor.
    """

    def __init__(
        self,
        real: Tensor,
        extractor: str = PIXELS,
        judge: DigitJudge | None = None,
        batch_size: int = 64,
        device: torch.device | str = "cpu",
    ):
        self.device = torch.device(device)
        self.extractor = load_extractor(extractor).to(self.device)
        self.judge = judge
        self.batch_size = batch_size
        self.real = self._features(real)
        self.statistics = statistics_of(self.real)

    def __call__(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        """Metrics of bytes (n, 1 or 3, H, W) with labels (n,): Fréchet distance (low is good), precision, recall and,
        with a judge, the share of digits that are read as their label (high is good).
        """
        features = self._features(images)
        manifolds = precision_recall(features, self.real)
        found = {
            f"Frechet distance ({self.extractor.name})": frechet_distance(statistics_of(features), self.statistics),
            "precision": manifolds.precision,
            "recall": manifolds.recall,
        }
        if self.judge is not None:
            found["read as their label"] = self.judge.accuracy(images.float() / 127.5 - 1, labels.cpu())
        return found

    def _features(self, images: Tensor) -> Tensor:
        images = images.expand(-1, 3, -1, -1)
        return shared_features(images, self.extractor, ["pool"], self.batch_size, self.device)["pool"]
