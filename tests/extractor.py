"""A small feature extractor for tests, and random Inception weights."""

import os
from pathlib import Path

import torch
from torch import nn


class Colours(nn.Module):
    """Random projections of an image's mean colours in a 2x2 grid: (N, 6) features, (N, 4) spatial and logits."""

    name = "Colours"
    layers = ("pool", "spatial", "logits")
    resize = "none"

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(12, 14, generator=generator))

    def forward(self, images, layers):
        grid = nn.functional.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)  # (N, 12)
        pool, spatial, logits = (grid @ self.weight).split((6, 4, 4), 1)
        found = {"pool": pool, "spatial": spatial, "logits": logits}
        return {layer: found[layer] for layer in layers}


class Broken(Colours):
    """Cannot go on, on the second of several ranks."""

    def forward(self, images, layers):
        if os.environ.get("RANK") == "1":
            raise RuntimeError("this rank cannot go on")
        return super().forward(images, layers)


class Nameless(nn.Module):
    """No extractor: it says nothing of its layers."""


def write_random_inception(path: Path) -> None:
    """Random weights in the form of torch-fidelity's file, large enough for features to differ between images."""
    import torch_fidelity.feature_extractor_inceptionv3 as fidelity

    class Random(fidelity.FeatureExtractorInceptionV3):
        def load_state_dict(self, state):
            """Keep what was drawn."""

    torch.save({}, path)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Random("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path))
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    torch.save(network.state_dict(), path)
