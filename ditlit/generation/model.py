"""A checkpoint from which one draws in Python: ``ditlit.load(path).sample(["cat", "dog"])``."""

import copy
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ditlit import checkpoints
from ditlit.checkpoints import Loaded
from ditlit.checkpoints.contents import variant_name
from ditlit.data.arrays import labels_of
from ditlit.data.classes import parse_classes
from ditlit.diffusion import Sampling
from ditlit.errors import InputError, check_positive
from ditlit.generation.pipeline import Precision, SamplingPipeline, check_precision
from ditlit.images.vae import Autoencoder, load_autoencoder
from ditlit.settings import Classes


class Model:
    """A denoiser with its weights, and all that is needed to draw with it.

    Attributes:
        denoiser: the network, on the CPU in float32, as the checkpoint has it; drawing uses a copy.
        process: its diffusion process.
        latents: what is known of its latents: ``shift``, ``scale``, ``vae``.
        step: optimizer steps taken, 0 where unknown.
        weights: ``ema``, ``raw``, or ``unknown``.
        class_names: by class, or None where they are unknown.
    """

    def __init__(self, loaded: Loaded, vae: str | None, device: torch.device, precision: Precision, compile: bool):
        self.denoiser: nn.Module = loaded.denoiser
        self.process = loaded.process
        self.latents = loaded.latents
        self.step = loaded.step
        self.weights = loaded.weights
        self.class_names: list[str] | None = loaded.latents.get("class_names")
        self.device = device
        self._vae = vae
        self._settings = precision, compile

    @cached_property
    def autoencoder(self) -> Autoencoder:
        """The VAE of its latents, loaded when it is first needed."""
        return load_autoencoder(self.latents.get("vae"), self._vae, self.denoiser.in_channels).to(self.device)

    @cached_property
    def _drawer(self) -> SamplingPipeline:
        precision, compile = self._settings
        denoiser = copy.deepcopy(self.denoiser)  # a pipeline replaces layers
        return SamplingPipeline(
            denoiser, self.process, self.latents, Sampling(), 0, self.device, precision, self._decode, compile=compile
        )

    def _decode(self, latents: Tensor) -> Tensor:
        return self.autoencoder.decode(latents)

    def sample(
        self,
        classes: Classes | Tensor | np.ndarray,
        sampling: Sampling | None = None,
        seed: int = 0,
        batch_size: int = 32,
    ) -> Tensor:
        """Draw an image for each of N classes, which may come again.

        Image i depends on the seed, i, its class and ``sampling``, and is that of ``ditlit sample`` with these.

        Args:
            classes: numbers or names, as a list or separated by commas, of which what is the name of a class is taken
                for the name; or labels (N,) as a tensor or array.
            sampling: how it is drawn; 50 steps of DDIM with guidance 4 by default.
            seed: of all noise.
            batch_size: images drawn at once.

        Returns:
            Bytes (N, 3 or 1, H, W) on the CPU.

        Raises:
            InputError: for classes that there are not, or settings that do not fit; where the VAE cannot be had, the
                memory does not suffice, or an image is not finite.
        """
        y = self._labels(classes)
        _ = self.autoencoder  # one that cannot be had is told before anything is drawn
        return self._drawer.images(self.sample_latents(y, sampling, seed, batch_size))

    def sample_latents(
        self,
        classes: Classes | Tensor | np.ndarray,
        sampling: Sampling | None = None,
        seed: int = 0,
        batch_size: int = 32,
    ) -> Tensor:
        """The same as latents (N, C, H, W) as the VAE gives them, on the model's device."""
        sampling = sampling or Sampling()
        sampling.check(self.process, self.denoiser.in_channels)
        check_positive(batch_size=batch_size)
        y = self._labels(classes)
        self._drawer.seed = seed
        parts = [range(i, min(i + batch_size, len(y))) for i in range(0, len(y), batch_size)]
        return torch.cat([self._drawer.draw(part, y[part.start : part.stop], sampling) for part in parts])

    def _labels(self, classes: Classes | Tensor | np.ndarray) -> Tensor:
        num_classes = self.denoiser.num_classes
        if not isinstance(classes, (Tensor, np.ndarray)):
            return torch.tensor(parse_classes(classes, num_classes, self.class_names))
        y = labels_of(classes)
        if y.ndim != 1 or len(y) == 0:
            raise InputError(f"labels are a row of numbers, one for each image; got an array of shape {tuple(y.shape)}")
        if not ((y >= 0) & (y < num_classes)).all():
            raise InputError(f"labels lie in 0..{num_classes - 1}, got {y.tolist()}")
        return y

    def __repr__(self) -> str:
        name = variant_name(getattr(self.denoiser, "config", {})) or type(self.denoiser).__name__
        weights = "weights" if self.weights == "unknown" else f"{self.weights} weights"
        step = f" of step {self.step:,}" if self.step else ""
        return f"Model({name}, {self.denoiser.num_classes:,} classes, {weights}{step})"


def load(
    source: str | Path,
    weights: Literal["ema", "raw"] = "ema",
    vae: str | None = None,
    device: str | torch.device | None = None,
    precision: Precision = "32",
    compile: bool = False,
    **reading: Any,
) -> Model:
    """Load weights in any format, to draw with them: ``ditlit.load("runs/digits").sample([0, 1, 2])``.

    Args:
        source: a checkpoint of ours, the folder of a run (its last checkpoint), the released DiT weights (.pt), a
            diffusers folder, a safetensors file, or a name on the hub.
        weights: the moving average, or those that the optimizer holds.
        vae: folder or hub name of the VAE, instead of the one that the checkpoint names.
        device: to draw on; the GPU if there is one.
        precision: of the denoiser: 32, tf32, bf16 or fp16.
        compile: compile the denoiser, which pays for many images.
        reading: how the source is read, as for ``ditlit.checkpoints.load``.

    Raises:
        InputError: when the source is missing, damaged or foreign, see ``ditlit.checkpoints.load``; or for a precision
            that the device does not compute in.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    check_precision(precision, device)
    return Model(checkpoints.load(source, weights, **reading), vae, device, precision, compile)
