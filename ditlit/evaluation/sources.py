"""What can be compared: images, or statistics that were made of them before."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ditlit.data.folders import write_atomically
from ditlit.data.manifest import MANIFEST
from ditlit.errors import InputError
from ditlit.evaluation.extractors import Extractor, Inception, describe
from ditlit.evaluation.images import FolderImages, Images, StoreImages
from ditlit.evaluation.npz import NpzImages, npz_keys, read_npz
from ditlit.evaluation.statistics import Statistics

METADATA = "ditlit statistics"
KEPT_FEATURES = 10_000  # of the images behind a statistics file, for precision and recall
ADM_KEYS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


@dataclass
class Source:
    """One side of a comparison.

    Args:
        about: what a report says of it.
        images: to extract features from, where there are any.
        statistics: of each layer, where they come with the source.
        features: of each layer (n, D), where they come with the source or have been extracted.
    """

    about: dict[str, Any]
    images: Images | None = None
    statistics: dict[str, Statistics] = field(default_factory=dict)
    features: dict[str, Tensor] = field(default_factory=dict)


def open_source(
    location: str,
    extractor: Extractor,
    size: int | None = None,
    vae: str | None = None,
    device: torch.device | str = "cpu",
) -> Source:
    """Open a folder of images, an npz file of images or of ADM's statistics, a statistics file of ours, or a store.

    Args:
        location: of it.
        extractor: statistics must have been made with it.
        size: cut and resize the images of a folder to this side.
        vae: of a latent store, instead of the one that its manifest names.
        device: on which a store is decoded.

    Raises:
        InputError: where it is none of these, empty, or does not fit.
    """
    path = Path(location)
    if not path.exists() and "://" not in location:
        raise InputError(f"there is nothing at {location}")
    if "://" in location or (path / MANIFEST).is_file():
        if size is not None:
            raise InputError(f"{location} is a latent store, whose decodes are not resized; leave the size out")
        images: Images = StoreImages(location, vae, device)
        return Source(images.about, images)
    if path.is_dir():
        images = FolderImages(path, size)
        return Source(images.about, images)
    if size is not None:
        raise InputError(f"only folders of images are resized, and {location} is a file; leave the size out")
    if path.suffix == ".npz":
        return open_npz(path, extractor)
    if path.suffix == ".safetensors":
        return read_statistics(path, extractor)
    raise InputError(
        f"{location} is no folder of images, no .npz file, no .safetensors file of statistics and no latent store"
    )


def open_npz(path: Path, extractor: Extractor) -> Source:
    keys = npz_keys(path)
    if "arr_0" not in keys and not {"mu", "sigma"} <= keys:
        raise InputError(
            f"{path} holds {', '.join(sorted(keys)) or 'nothing'}; images are arr_0, and statistics mu and sigma, with "
            "mu_s and sigma_s for sFID"
        )
    images = NpzImages(path) if "arr_0" in keys else None
    if "mu" not in keys:
        return Source(images.about, images)
    if not isinstance(extractor, Inception):
        raise InputError(
            f"the statistics in {path} are of Inception's features, not of {extractor.name}'s: compare with images"
        )
    about = {"kind": "ADM statistics", "location": str(path), "resize": "as whoever made them did"}
    about |= {"n": len(images) if images else None, "size": images.about["size"] if images else None}
    statistics = {}
    for layer, (mean, cov) in ADM_KEYS.items():
        if {mean, cov} <= keys:
            arrays = {k: torch.from_numpy(v).double() for k, v in read_npz(path, (mean, cov)).items()}
            dimension = arrays[mean].numel()
            if arrays[mean].ndim != 1 or arrays[cov].shape != (dimension, dimension):
                raise InputError(
                    f"{path} holds {mean} of shape {tuple(arrays[mean].shape)} and {cov} of shape "
                    f"{tuple(arrays[cov].shape)}; they should be (D,) and (D, D)"
                )
            statistics[layer] = Statistics(arrays[mean], arrays[cov])
    return Source(about, images, statistics)


def write_statistics(path: Path, source: Source, extractor: Extractor) -> None:
    """Keep a source's statistics, and some of its features, in a safetensors file."""
    tensors = {}
    for layer, statistics in source.statistics.items():
        tensors |= {f"{layer}.mean": statistics.mean.cpu(), f"{layer}.cov": statistics.cov.cpu()}
    if "pool" in source.features:
        tensors["pool.features"] = spread(source.features["pool"], KEPT_FEATURES).contiguous()
    about = {"source": source.about, "extractor": describe(extractor)}
    about["n"] = {layer: statistics.n for layer, statistics in source.statistics.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, safetensors.torch.save(tensors, {METADATA: json.dumps(about)}))


def read_statistics(path: Path, extractor: Extractor) -> Source:
    """The inverse of :func:`write_statistics`.

    Raises:
        InputError: for another file, or statistics of another extractor.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})[METADATA])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
        raise InputError(
            f"{path} is no file of statistics ({type(error).__name__}: {error}); make one with ditlit evaluate "
            "--reference IMAGES --save_stats FILE"
        ) from None
    made_with, ours = about["extractor"], describe(extractor)
    for name in ("name", "weights", "resize"):
        if made_with[name] != ours[name]:
            raise InputError(
                f"the statistics in {path} were made with another extractor, {name} {made_with[name]!r} and not "
                f"{ours[name]!r}; make them again"
            )
    statistics = {
        layer: Statistics(tensors[f"{layer}.mean"], tensors[f"{layer}.cov"], n) for layer, n in about["n"].items()
    }
    described = about["source"] | {"statistics file": str(path)}
    features = {"pool": tensors["pool.features"]} if "pool.features" in tensors else {}
    return Source(described, None, statistics, features)


def spread(features: Tensor, most: int) -> Tensor:
    """At most so many rows, evenly spaced."""
    if len(features) <= most:
        return features
    return features[torch.linspace(0, len(features) - 1, most).round().long()]


def content_hash(source: Source) -> str:
    """SHA-256 of what a source holds: its images, else its statistics."""
    if source.images is not None and not source.statistics:
        return source.images.digest()
    digest = hashlib.sha256()
    for layer, statistics in sorted(source.statistics.items()):
        digest.update(layer.encode())
        digest.update(statistics.mean.cpu().numpy())
        digest.update(statistics.cov.cpu().numpy())
    return digest.hexdigest()
