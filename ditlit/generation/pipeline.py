"""Drawing latents and images from a loaded checkpoint."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ditlit.data.store import per_channel
from ditlit.diffusion import Process, Sampling, draw_samples
from ditlit.diffusion.process import StepCallback
from ditlit.diffusion.sampling import check_finite
from ditlit.errors import InputError
from ditlit.generation.onednn import fuse
from ditlit.images.vae import Decoder
from ditlit.models import DiT
from ditlit.pictures import check_decoded, to_uint8
from ditlit.precision import float32_products

Precision = Literal["32", "tf32", "bf16", "fp16"]
WEIGHTS = {"32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class SamplingPipeline:
    """Draws images on one device.

    Args:
        denoiser: with its weights. It is moved to the device. A DiT is taken to the precision, and its layers are
            replaced by faster ones on a CPU; another denoiser runs under autocast.
        process: its diffusion process.
        latents: ``shift`` and ``scale`` of the latents, as in a checkpoint.
        sampling: how samples are drawn.
        seed: of all noise.
        device: to draw on.
        precision: of the denoiser: 32, tf32 (float32 with fast matrix products on GPUs), bf16 or fp16. The samplers'
            own arithmetic is float32 always, and so is the VAE's, with fast products for tf32 only.
        decode: from raw latents to images in [-1, 1]; None to draw latents only.
        decode_batch_size: images decoded at once.
        compile: compile the denoiser.

    Raises:
        InputError: for a precision that there is not, or fp16 on a CPU.
    """

    denoiser: nn.Module
    process: Process
    latents: dict[str, Any]
    sampling: Sampling
    seed: int
    device: torch.device
    precision: Precision = "32"
    decode: Decoder | None = None
    decode_batch_size: int = 16
    compile: bool = False
    shape: tuple[int, int, int] = field(init=False)

    def __post_init__(self):
        self.shape = (self.denoiser.in_channels, *self.denoiser.input_size)
        check_precision(self.precision, self.device)
        dtype = WEIGHTS[self.precision]
        known = isinstance(self.denoiser, DiT)
        self.autocast = None if known or dtype == torch.float32 else dtype
        self.denoiser.to(self.device, torch.float32 if self.autocast else dtype)
        if self.compile:
            self.denoiser.compile()
        elif self.device.type == "cpu":
            fuse(self.denoiser)
        channels = self.shape[0]
        self.shift = per_channel(self.latents["shift"], channels).to(self.device)
        self.scale = per_channel(self.latents["scale"], channels).to(self.device)

    def draw(
        self,
        indices: Sequence[int],
        y: Tensor,
        sampling: Sampling | None = None,
        callback: StepCallback | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Raw latents (N, C, H, W) of the samples with these numbers and labels y (N,).

        Raises:
            InputError: where the device's memory does not suffice, or a sample is not finite.
        """
        sampling = sampling or self.sampling
        y = y.to(self.device)
        drawn_from = (self.process, self.denoiser, self.shape, y, self.denoiser.num_classes, indices, self.seed)
        autocast = torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None)
        with (
            matmul_precision(self.precision), enough_memory("--batch_size", len(y)), torch.inference_mode(), autocast
        ):  # fmt: skip
            x0 = draw_samples(sampling, *drawn_from, callback=callback, noise=noise)
            check_finite(x0, sampling, *drawn_from, noise=noise)
            return self.raw(x0)

    def raw(self, x0: Tensor) -> Tensor:
        """Latents as the VAE knows them, from what the denoiser knows."""
        return x0.float() / self.scale + self.shift

    def images(self, latents: Tensor, indices: Sequence[int] | None = None) -> Tensor:
        """Raw latents (N, C, H, W) to bytes (N, 3 or 1, H', W') on the CPU, decoded in slices.

        Raises:
            InputError: where the device's memory does not suffice, or a picture is not finite: it is named by its
                number in ``indices``.
        """
        size = self.decode_batch_size
        indices = range(len(latents)) if indices is None else indices
        images = []
        enough = enough_memory("--decode_batch_size, or set --vae_tiling true", min(size, len(latents)))
        with matmul_precision(self.precision), enough:
            for start in range(0, len(latents), size):
                decoded = self.decode(latents[start : start + size])
                check_decoded(decoded, indices[start : start + size])
                images.append(to_uint8(decoded).cpu())
        return torch.cat(images)


def check_precision(precision: Precision, device: torch.device) -> None:
    """Raise InputError for a precision that a device does not compute in."""
    if precision not in WEIGHTS:
        raise InputError(f"precision is one of {', '.join(WEIGHTS)}, got {precision!r}")
    if precision == "fp16" and device.type == "cpu":
        raise InputError("precision fp16 is for GPUs: CPUs have no fast products for it; use bf16 or 32 here")


@contextmanager
def enough_memory(setting: str, size: int):
    """Turn running out of memory into an error that names the setting to change."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise InputError(f"out of memory with {size} at once: lower {setting} ({error})") from error


def matmul_precision(precision: Precision) -> AbstractContextManager[None]:
    return float32_products(tf32=precision == "tf32")
