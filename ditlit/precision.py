"""How exact float32 products on GPUs are: PyTorch rounds what enters convolutions to TF32 unless it is told not to."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

# From 2.9 on torch has a word for each kind of product beside the older settings, and refuses to read these where the
# two differ.
HAS_WORDS = hasattr(torch.backends.cudnn, "conv")


@contextmanager
def float32_products(tf32: bool) -> Iterator[None]:
    """Inside, float32 matrix products and convolutions on GPUs are float32, or TF32; afterwards what they were."""
    matmul = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul) if HAS_WORDS else ()
    with kept(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, matmul), convolutions(tf32):
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        yield


@contextmanager
def convolutions_as_products() -> Iterator[None]:
    """Inside, float32 convolutions on GPUs are as exact as matrix products are set to be, which PyTorch sets apart."""
    with convolutions(tf32_products()):
        yield


def tf32_products() -> bool:
    """Whether float32 matrix products on GPUs may be TF32 now."""
    if HAS_WORDS:
        return torch.backends.cuda.matmul.fp32_precision == "tf32"
    return torch.get_float32_matmul_precision() != "highest"


@contextmanager
def convolutions(tf32: bool) -> Iterator[None]:
    cudnn = torch.backends.cudnn
    words = (cudnn.conv, cudnn.rnn) if HAS_WORDS else ()
    with kept(lambda: cudnn.allow_tf32, lambda value: setattr(cudnn, "allow_tf32", value), words):
        cudnn.allow_tf32 = tf32
        if HAS_WORDS:  # the older setting leaves convolutions to what is set for all products
            cudnn.conv.fp32_precision = "tf32" if tf32 else "ieee"
        yield


@contextmanager
def kept(read: Callable[[], Any], write: Callable[[Any], None], words: tuple[Any, ...]) -> Iterator[None]:
    """Put an older setting and its words back at the end; a setting that cannot be read is left to its words."""
    found = [place.fp32_precision for place in words]
    try:
        before = [read()]
    except RuntimeError:
        before = []
    try:
        yield
    finally:
        for value in before:
            write(value)
        for place, value in zip(words, found, strict=True):
            place.fp32_precision = value
