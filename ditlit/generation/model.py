"""A checkpoint from which one draws in Python: ``ditlit.load(path).sample(["cat", "dog"])``."""

import copy
from functools import cached_property
from pathlib import Path
from typing import Literal, Unpack

import torch
from torch import Tensor, nn

from ditlit import checkpoints
from ditlit.checkpoints import Loaded, Reading
from ditlit.checkpoints.contents import variant_name
from ditlit.data.classes import Classes, parse_classes
from ditlit.data.vae import Autoencoder, load_autoencoder
from ditlit.diffusion import Sampling
from ditlit.errors import InputError
from ditlit.generation.drawing import Drawer, Precision


class Model:
    """A denoiser with its weights, and all that is needed to draw with it.

    Attributes:
        denoiser: the network, on the CPU in float32, as the checkpoint has it; drawing uses a copy.
        process: its diffusion process.
        latents: what is known of its latents: ``shift``, ``scale``, ``vae``.
        step: optimizer steps taken, 0 where unknown.
        weights: ``ema`` or ``raw``.
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
    def _drawer(self) -> Drawer:
        precision, compile = self._settings
        denoiser = copy.deepcopy(self.denoiser)  # a drawer replaces layers
        return Drawer(
            denoiser, self.process, self.latents, Sampling(), 0, self.device, precision, self._decode, compile=compile
        )

    def _decode(self, latents: Tensor) -> Tensor:
        return self.autoencoder.decode(latents)

    def sample(
        self,
        classes: Classes | Tensor,
        sampling: Sampling | None = None,
        seed: int = 0,
        batch_size: int = 32,
    ) -> Tensor:
        """Draw an image for each of N classes, which may come again.

        Image i depends on the seed, i, its class and ``sampling``, and is that of ``ditlit sample`` with these.

        Args:
            classes: numbers or names, as a list or separated by commas, of which what is the name of a class is taken
                for the name; or labels (N,).
            sampling: how it is drawn; 50 steps of DDIM with guidance 4 by default.
            seed: of all noise.
            batch_size: images drawn at once.

        Returns:
            Bytes (N, 3 or 1, H, W) on the CPU.

        Raises:
            InputError: for classes that there are not, or settings that do not fit; where the VAE cannot be had, the
                memory does not suffice, or an image is not finite.
        """
        latents = self.sample_latents(classes, sampling, seed, batch_size)
        return self._drawer.images(latents)

    def sample_latents(
        self,
        classes: Classes | Tensor,
        sampling: Sampling | None = None,
        seed: int = 0,
        batch_size: int = 32,
    ) -> Tensor:
        """The same as latents (N, C, H, W) as the VAE gives them, on the model's device."""
        sampling = sampling or Sampling()
        sampling.check(self.process, self.denoiser.in_channels)
        y = classes if isinstance(classes, Tensor) else self._labels(classes)
        if not ((y >= 0) & (y < self.denoiser.num_classes)).all():
            raise InputError(f"labels lie in 0..{self.denoiser.num_classes - 1}, got {y.tolist()}")
        self._drawer.seed = seed
        parts = [range(i, min(i + batch_size, len(y))) for i in range(0, len(y), batch_size)]
        return torch.cat([self._drawer.draw(part, y[part.start : part.stop], sampling) for part in parts])

    def _labels(self, classes: Classes) -> Tensor:
        return torch.tensor(parse_classes(classes, self.denoiser.num_classes, self.class_names))

    def __repr__(self) -> str:
        name = variant_name(getattr(self.denoiser, "config", {})) or type(self.denoiser).__name__
        return f"Model({name}, {self.denoiser.num_classes:,} classes, {self.weights} weights of step {self.step:,})"


def load(
    source: str | Path,
    weights: Literal["ema", "raw"] = "ema",
    vae: str | None = None,
    device: str | torch.device | None = None,
    precision: Precision = "32",
    compile: bool = False,
    **reading: Unpack[Reading],
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
        InputError: when the source is missing, damaged or foreign; see ``ditlit.checkpoints.load``.
    """
    loaded = checkpoints.load(source, weights, **reading)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return Model(loaded, vae, torch.device(device), precision, compile)
