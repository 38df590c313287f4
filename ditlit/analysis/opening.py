"""A checkpoint with all that is needed to look into it: both sets of weights, its latents and its decoder."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import Tensor

from ditlit import checkpoints
from ditlit.checkpoints import Loaded
from ditlit.data.manifest import MANIFEST
from ditlit.data.store import LatentStore, mean_latents, per_channel
from ditlit.diffusion import Sampling
from ditlit.errors import InputError, counted
from ditlit.generation.pipeline import SamplingPipeline
from ditlit.images.vae import Autoencoder, load_autoencoder
from ditlit.pictures import to_uint8


@dataclass
class OpenCheckpoint:
    """What :func:`open_checkpoint` found.

    Args:
        ema: the model with the averaged weights, or with the only ones that there are.
        raw: the model with the weights that the optimizer held; None where the checkpoint has them not.
        store: latents that belong to it.
        autoencoder: that made them.
        device: of the models and of the results here.
    """

    ema: Loaded
    raw: Loaded | None
    store: LatentStore
    autoencoder: Autoencoder
    device: torch.device

    @property
    def class_names(self) -> list[str]:
        names = self.store.manifest.class_names or self.ema.latents.get("class_names")
        return names or [str(i) for i in range(self.ema.denoiser.num_classes)]

    def rows(self, n: int) -> Tensor:
        """The numbers of at most n samples, spread evenly over the store."""
        return torch.linspace(0, len(self.store) - 1, min(n, len(self.store))).round().long()

    def raw_latents(self, rows: Tensor) -> Tensor:
        """Latents (N, C, H, W) of the samples at ``rows`` (N,) as the VAE gives them; the mean of a posterior."""
        return mean_latents(self.store.gather(rows)).to(self.device)

    def samples(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """x0 (N, C, H, W) of the samples at ``rows`` (N,) as the denoiser sees them, and their labels (N,)."""
        shift, scale = self._shift_and_scale()
        return (self.raw_latents(rows) - shift) * scale, self.store.labels[rows].to(self.device)

    def images(self, x0: Tensor) -> Tensor:
        """Bytes (N, 3 or 1, H', W') of latents as the denoiser sees them (N, C, H, W), on the CPU."""
        shift, scale = self._shift_and_scale()
        return self.decode(x0 / scale + shift)

    def decode(self, latents: Tensor) -> Tensor:
        """Bytes (N, 3 or 1, H', W') of latents as the VAE gives them (N, C, H, W), on the CPU."""
        return torch.cat([to_uint8(self.autoencoder.decode(part)).cpu() for part in latents.split(16)])

    def pipeline(self, sampling: Sampling, weights: Literal["ema", "raw"] = "ema", seed: int = 0) -> SamplingPipeline:
        """Draws with a copy of the model.

        Raises:
            InputError: where the checkpoint has no raw weights and they are asked for.
        """
        loaded = self.ema if weights == "ema" else self.raw
        if loaded is None:
            raise InputError("this checkpoint holds one set of weights only; draw with weights='ema'")
        denoiser = copy.deepcopy(loaded.denoiser)  # a pipeline replaces layers
        return SamplingPipeline(
            denoiser, loaded.process, loaded.latents, sampling, seed, self.device, decode=self.autoencoder.decode
        )

    def _shift_and_scale(self) -> tuple[Tensor, Tensor]:
        channels = self.ema.denoiser.in_channels
        shift, scale = (per_channel(self.ema.latents[name], channels).to(self.device) for name in ("shift", "scale"))
        return shift, scale


def open_checkpoint(
    ckpt: str | Path,
    store: str | Path | None = None,
    vae: str | None = None,
    device: torch.device | str | None = None,
    **reading: Any,
) -> OpenCheckpoint:
    """Open a checkpoint of any kind.

    Args:
        ckpt: as for :func:`ditlit.checkpoints.load`.
        store: latents of its kind; by default those of the run that wrote the checkpoint, held out ones if it has some.
        vae: where to load the autoencoder from, instead of the place that the checkpoint names.
        device: by default a GPU where there is one.
        reading: what else ``load`` there takes: ``trust``, ``num_heads`` and so on.

    Raises:
        InputError: where something is missing or the store's latents are of another shape or number of classes.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    ckpt = checkpoints.found(ckpt)
    loaded = checkpoints.load(ckpt, **reading)
    opened = LatentStore(find_store(ckpt) if store is None else store)
    manifest, denoiser = opened.manifest, loaded.denoiser
    built_for = (denoiser.in_channels, *denoiser.input_size), denoiser.num_classes
    if (manifest.shape, manifest.num_classes) != built_for:
        raise InputError(
            f"{opened.location} holds latents of shape {manifest.shape} in {counted(manifest.num_classes, 'class')}, "
            f"{ckpt} is built for {built_for[0]} in {built_for[1]}; name another store"
        )
    raw = other_weights(ckpt, loaded, **reading)
    for model in (loaded, raw):
        if model is not None:
            model.denoiser.to(device).requires_grad_(False)
    autoencoder = load_autoencoder(loaded.latents.get("vae", manifest.vae), vae, manifest.shape[0]).to(device)
    return OpenCheckpoint(loaded, raw, opened, autoencoder, device)


def other_weights(ckpt: str | Path, loaded: Loaded, **reading: Any) -> Loaded | None:
    """The weights that the optimizer held, where a checkpoint has them beside their average."""
    if loaded.weights != "ema":
        return None
    try:
        raw = checkpoints.load(ckpt, "raw", **reading)
    except InputError:  # it holds the average only
        return None
    return raw if raw.weights == "raw" else None


def find_store(ckpt: str | Path) -> Path:
    """The store that a run's ``config.yaml``, two folders above its checkpoint, names: held out latents if it has some.

    Relative paths are looked for here and in every folder above the run.

    Raises:
        InputError: where there is none to be found.
    """
    run = Path(ckpt).resolve().parent.parent
    config = run / "config.yaml"
    if not config.is_file():
        raise InputError(
            f"{ckpt} does not lie in the folder of a run with a config.yaml: name the store of its latents"
        )
    named = named_stores(yaml.safe_load(config.read_text()))
    for name in named:
        for above in (Path(), run, *run.parents):
            for folder in (Path("val"), Path(), Path("train")):
                if (above / name / folder / MANIFEST).is_file():
                    return above / name / folder
    raise InputError(f"the stores that {config} names ({', '.join(named) or 'none'}) are not there: name another store")


def named_stores(config: Any) -> list[str]:
    """The stores of a run's configuration, those of held out samples first."""
    data = (config or {}).get("data") or {}
    settings = data.get("init_args", data)
    store = settings.get("store")
    stores = [store] if isinstance(store, str) else list(store or ())
    return [name for name in (settings.get("val_store"), *stores) if name]
