"""Networks that turn images into features: Inception as the paper's numbers need it, DINOv2, or one of the user's."""

import hashlib
import inspect
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ditlit.errors import InputError
from ditlit.images.vae import weights_hash

INCEPTION = "inception"
DINO = "dinov2"
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
INCEPTION_HASH = "6726825d"  # the first letters of the file's SHA-256
SPATIAL_CHANNELS = 7
LAYERS = ("pool", "spatial", "logits")

# Layer -> (N, D): "pool" for distances, precision and recall; "spatial" for sFID and "logits" for the Inception Score.
Features = dict[str, Tensor]


class Extractor(Protocol):
    """A frozen ``nn.Module`` that turns images into features. A class path names its class, made without arguments.

    Attributes:
        name: stands in the names of its metrics.
        layers: those that it has; ``pool`` at least.
        resize: how it resizes images, in words.
    """

    name: str
    layers: tuple[str, ...]
    resize: str

    def __call__(self, images: Tensor, layers: Sequence[str]) -> Features:
        """Features (N, D) in float32 of bytes (N, 3, H, W) on its device, for each of the layers asked for."""
        ...


class Inception(nn.Module):
    """Inception-v3 of 2015 as torch-fidelity carries it, whose features are TensorFlow's to rounding.

    ``pool`` (N, 2048) is pool_3; ``logits`` (N, 1008) lack the bias of the last layer, as in the ADM evaluator;
    ``spatial`` (N, 2023) is ``mixed_6/conv``, its first seven channels in the order height, width, channel.

    Args:
        weights: the file of torch-fidelity's weights; by default the one in torch's hub cache.

    Raises:
        InputError: where torch-fidelity or the weights are missing, or the file holds something else.
    """

    name = "Inception"
    layers = LAYERS
    resize = "bilinear to 299x299 as TensorFlow 1 does"

    def __init__(self, weights: str | Path | None = None):
        super().__init__()
        path = inception_weights(weights)
        fidelity = torch_fidelity("feature_extractor_inceptionv3")
        try:
            torch.load(path, map_location="cpu", weights_only=True)  # torch-fidelity would run code that a file holds
            self.network = fidelity.FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
            )
        except Exception as error:
            raise InputError(
                f"{path} does not hold torch-fidelity's Inception weights ({type(error).__name__}: "
                f"{str(error).splitlines()[0]}); get {INCEPTION_FILE} from {INCEPTION_URL}"
            ) from error
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        self.original = digest.startswith(INCEPTION_HASH)
        self._spatial: Tensor | None = None
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self._spatial = output  # (N, 192, 17, 17)

    def forward(self, images: Tensor, layers: Sequence[str]) -> Features:
        self.network.features_list = ["2048", "logits_unbiased"] if "logits" in layers else ["2048"]
        pool, *logits = self.network(images)
        found = {"pool": pool, "spatial": flat_spatial(self._spatial), **({"logits": logits[0]} if logits else {})}
        self._spatial = None
        return {layer: found[layer] for layer in layers}


def flat_spatial(features: Tensor) -> Tensor:
    """The first seven channels of (N, C, H, W) as (N, H W 7): channels vary fastest, as TensorFlow lays them out."""
    return features[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)


def inception_weights(weights: str | Path | None) -> Path:
    cached = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    path = cached if weights is None else Path(weights).expanduser()
    if path.is_file():
        return path
    raise InputError(
        f"there are no Inception weights at {path}: get {INCEPTION_URL} and put it there"
        + (", or give its path with --inception_weights" if weights is None else "")
    )


class DinoV2(nn.Module):
    """DINOv2 ViT-L/14, loaded by torch-fidelity through torch's hub, which fetches it once.

    Raises:
        InputError: where it cannot be had.
    """

    name = "DINOv2"
    layers = ("pool",)
    resize = "bilinear to 224x224 as TensorFlow 1 does"

    def __init__(self):
        super().__init__()
        fidelity = torch_fidelity("feature_extractor_dinov2")
        try:
            self.network = fidelity.FeatureExtractorDinoV2("dinov2-vit-l-14", ["dinov2"])
        except Exception as error:
            raise InputError(
                f"DINOv2 cannot be had ({type(error).__name__}: {error}); run "
                f"torch.hub.load('facebookresearch/dinov2', 'dinov2_vitl14') where there is a network, and copy "
                f"{torch.hub.get_dir()} here"
            ) from error

    def forward(self, images: Tensor, layers: Sequence[str]) -> Features:
        return dict(zip(layers, self.network(images), strict=True))


def torch_fidelity(module: str) -> Any:
    try:
        return import_module(f"torch_fidelity.{module}")
    except ImportError:
        raise InputError("this extractor needs torch-fidelity: pip install 'ditlit[evaluate]'") from None


def load_extractor(source: str = INCEPTION, inception_weights: str | Path | None = None) -> Extractor:
    """An extractor in eval mode, on the CPU.

    Args:
        source: ``inception``, ``dinov2``, or the class path of another one.
        inception_weights: see :class:`Inception`.

    Raises:
        InputError: where it cannot be loaded or is no extractor.
    """
    if source == INCEPTION:
        extractor: Any = Inception(inception_weights)
    elif source == DINO:
        extractor = DinoV2()
    else:
        extractor = from_class_path(source)
    return extractor.eval().requires_grad_(False)


def from_class_path(path: str) -> nn.Module:
    module, _, name = path.rpartition(".")
    try:
        cls = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            f"--extractor takes {INCEPTION}, {DINO} or the path of a class, as in package.module.Class; {path!r} "
            f"cannot be imported: {error}"
        ) from None
    extractor = cls()
    missing = [word for word in ("name", "layers", "resize") if not hasattr(extractor, word)]
    if not isinstance(extractor, nn.Module) or missing or "pool" not in extractor.layers:
        raise InputError(
            f"{path} is no extractor: it must be an nn.Module with name, resize, and layers that name 'pool'"
        )
    return extractor


def describe(extractor: Extractor) -> dict[str, Any]:
    """What a report says of an extractor."""
    cls = type(extractor)
    about = {
        "name": extractor.name,
        "class": f"{cls.__module__}.{cls.__qualname__}",
        "weights": weights_hash(extractor),
        "resize": extractor.resize,
        "code": code_hash(cls),
    }
    if isinstance(extractor, Inception):
        about["original weights"] = extractor.original
    return about


def code_hash(cls: type) -> str | None:
    """SHA-256 of a class's source: the same weights behind another preprocessing give other features."""
    try:
        return hashlib.sha256(inspect.getsource(cls).encode()).hexdigest()
    except (OSError, TypeError):  # made without a file
        return None
