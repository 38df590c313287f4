"""Arrays and fields as users have them, as what a latent store holds."""

import json
import operator
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from difflib import get_close_matches
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ditlit.data.manifest import LABEL_BYTES, PIXEL_CHANNELS, Manifest, Shard, wrong_field
from ditlit.data.shards import DTYPES
from ditlit.errors import InputError

Array = Tensor | np.ndarray | Sequence
ABOUT = ("shift", "scale", "class_names", "image_size", "preprocessing", "vae")


def tensor_of(array: Array, what: str) -> Tensor:
    """A tensor, numpy array or list as a tensor on the CPU, of the same memory where that can be.

    Raises:
        InputError: where it holds no numbers, or rows of different lengths.
    """
    if isinstance(array, Tensor):
        return array.detach().cpu()
    try:
        if isinstance(array, (list, tuple)) and array and all(isinstance(part, Tensor) for part in array):
            return torch.stack([part.detach().cpu() for part in array])
        values = np.ascontiguousarray(array)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of arrays that cannot be written to; nothing writes to them
            return torch.from_numpy(values.astype(values.dtype.newbyteorder("="), copy=False)).view(np.shape(array))
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"the {what} are no array of numbers: {error}") from None


def latents_of(array: Array, what: str) -> Tensor:
    """Latents in a type that a store holds; float64, as numpy and Python count, becomes float32."""
    latents = tensor_of(array, what)
    if latents.dtype == torch.float64:
        latents = latents.float()
    if latents.dtype not in DTYPES.values():
        raise InputError(
            f"the {what} are {str(latents.dtype).removeprefix('torch.')}, and a store holds float16, bfloat16 or "
            "float32; bytes of pictures x are pixels in [-1, 1] as x / 127.5 - 1"
        )
    if not torch.isfinite(latents).all():
        raise InputError(f"the {what} hold NaN or Inf; encode them in a wider type")
    return latents


def labels_of(array: Array) -> Tensor:
    """Labels of any type of number as int64."""
    labels = tensor_of(array, "labels")
    if labels.is_complex() or (labels.is_floating_point() and not torch.equal(labels, labels.round())):
        raise InputError("the labels are no whole numbers; give the number of each sample's class, from 0 on")
    return labels.long()


def manifest_of(kind: str, shape: tuple[int, int, int], num_classes: int, num_samples: int, **about: Any) -> Manifest:
    """The manifest of a store that is still to be written, without its shards; what is wrong is said now.

    Args:
        kind, shape, num_classes: as in :class:`Manifest`.
        num_samples: of the store.
        about: more of its fields; shift and scale may be numbers or arrays.

    Raises:
        InputError: for a field that there is not, or that cannot be meant.
    """
    flipped = about.pop("flipped", False)
    for name in about.keys() - set(ABOUT):
        near = get_close_matches(name, ABOUT, 1)
        raise InputError(f"a store has no field {name!r}" + (f"; did you mean {near[0]}?" if near else ""))
    for name in {"shift", "scale"} & about.keys():
        about[name] = tensor_of(about[name], name).double().flatten().tolist()
    if isinstance(about.get("class_names"), (tuple, np.ndarray)):
        about["class_names"] = list(about["class_names"])
    about = {name: plain(value) for name, value in about.items()}
    one = Shard("all", num_samples, LABEL_BYTES * num_samples, "")
    manifest = Manifest(kind, shape, plain(num_classes), [one], flipped=flipped, **about)
    wrong = wrong_field(manifest)
    if wrong is not None:
        raise InputError(f"a store cannot have {wrong}")
    vae = manifest.vae
    if vae is None and shape[0] not in PIXEL_CHANNELS:
        raise InputError(
            f"latents of {shape[0]} channels are no pixels: name the VAE that decodes them, as in "
            'vae={"source": "stabilityai/sd-vae-ft-ema"}'
        )
    if vae is not None and not isinstance(vae.get("source"), str):
        raise InputError('vae names no source; give a folder or a model of the hub, as {"source": "..."}')
    try:
        json.dumps(asdict(manifest))
    except TypeError as error:
        raise InputError(f"a store cannot have these fields: {error}") from None
    manifest.shards = []
    return manifest


def plain(value: Any) -> Any:
    """Integers of numpy and torch as Python's."""
    return operator.index(value) if hasattr(value, "__index__") and not isinstance(value, (bool, np.ndarray)) else value
