"""Between pictures and latents: a VAE from diffusers, or none for pixels, and which VAE is the right one."""

import hashlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ditlit import hub
from ditlit.data.manifest import PIXEL_CHANNELS
from ditlit.errors import InputError
from ditlit.precision import convolutions_as_products

# Raw latents (N, C, H, W) -> images (N, 3 or 1, H', W') in [-1, 1].
Decoder = Callable[[Tensor], Tensor]
PIXELS = "pixels"


def load_vae(source: str) -> nn.Module:
    """A frozen diffusers autoencoder from a local folder or, where the hub can be reached, by its name there.

    Raises:
        InputError: where it cannot be loaded, with the remedy.
    """
    folder = Path(source).expanduser()
    local = folder.is_dir()
    if not local and not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise InputError(
            f"cannot load the VAE {source!r}: there is no such folder, and names on the hub are OWNER/NAME"
        )
    from diffusers import AutoModel  # slow to import, and only needed for latents
    from diffusers.utils import logging

    online = not local and hub.reachable()  # without a network its client would try again for a minute
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it warns of settings that it does not use itself
    try:
        vae = AutoModel.from_pretrained(
            str(folder) if local else source, low_cpu_mem_usage=False, local_files_only=not online
        )
    except Exception as error:
        if local or online:
            why = f"({type(error).__name__}: {error})"
        else:
            why = "is no folder here, and the Hugging Face hub cannot be reached, nor has its cache the VAE"
        raise InputError(
            f"cannot load the VAE {source!r} {why}. Give a folder that holds a diffusers autoencoder (config.json and "
            "diffusion_pytorch_model.safetensors) or a name on a hub that can be reached"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    return vae.eval().requires_grad_(False)


def weights_hash(module: nn.Module) -> str:
    """SHA-256 of the names, shapes, types and bytes of a module's weights."""
    return state_hash(module.state_dict())


def state_hash(state: Mapping[str, Tensor]) -> str:
    """:func:`weights_hash` of a state dict."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


class Autoencoder:
    """Encodes pictures to raw latents, or to the moments of their posterior, and decodes raw latents.

    Its weights are float32. It decodes in float32 whatever surrounds it, so that the same latents are the same picture
    everywhere; autocast of the caller rounds what it encodes. On GPUs its convolutions are float32 too, or TF32 where
    float32 matrix products are allowed to be.

    Args:
        source: folder or name of a diffusers autoencoder; ``pixels`` for none, where the picture itself is the latent.

    Attributes:
        entry: what a store's manifest says of it: class, source and hash of the weights; None for pixels.
        kind: ``moments``, mean and standard deviation (N, 2C, H, W), where the autoencoder has a posterior, else
            ``latents`` (N, C, H, W).
        shift, scale: of x0 = (latent - shift) * scale as the autoencoder's configuration gives them, one value or one
            for each channel.

    Raises:
        InputError: where it cannot be loaded or encodes no still pictures.
    """

    def __init__(self, source: str):
        self.entry: dict[str, Any] | None = None
        self.kind = "latents"
        self.shift, self.scale = [0.0], [1.0]
        self.model: nn.Module | None = None
        if source == PIXELS:
            return
        model = load_vae(source)
        folder = Path(source).expanduser()
        place = str(folder.resolve()) if folder.is_dir() else source  # to be found from other folders too
        self.entry = {"class": type(model).__name__, "source": place, "hash": weights_hash(model)}
        # Channels last: convolutions run up to three times faster on a CPU, and tensor cores like it too.
        self.model = model.float().to(memory_format=torch.channels_last)
        config = self.model.config
        factor = getattr(config, "scaling_factor", None) or 1.0
        mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        self.shift = list(mean) if mean else [getattr(config, "shift_factor", None) or 0.0]
        self.scale = [factor / s for s in std] if std else [factor]
        try:
            probe = self._encoded(torch.zeros(1, 3, 64, 64).to(memory_format=torch.channels_last))
        except Exception as error:
            raise InputError(
                f"the VAE {source!r} ({type(model).__name__}) does not encode RGB pictures: {error}"
            ) from error
        self.kind = "moments" if hasattr(probe, "latent_dist") else "latents"

    def tile(self) -> None:
        """Decode in tiles from now on: less memory, and seams may show.

        Raises:
            InputError: where the autoencoder cannot.
        """
        if not hasattr(self.model, "enable_tiling"):
            raise InputError(f"{type(self.model).__name__} cannot decode in tiles; lower --decode_batch_size instead")
        self.model.enable_tiling()

    def to(self, device: torch.device) -> "Autoencoder":
        if self.model is not None:
            self.model.to(device)
        return self

    @torch.inference_mode()
    def encode(self, images: Tensor) -> Tensor:
        """Bytes (N, 3, H', W') to raw float32 moments (N, 2C, H, W) or latents (N, C, H, W)."""
        images = images.float() / 127.5 - 1
        if self.model is None:
            return images
        output = self._encoded(images.contiguous(memory_format=torch.channels_last))
        if self.kind == "moments":
            posterior = output.latent_dist
            return torch.cat([posterior.mean.float(), posterior.std.float()], dim=1)  # (N, 2C, H, W)
        return (output.latents if hasattr(output, "latents") else output.latent).float()  # (N, C, H, W)

    def _encoded(self, images: Tensor) -> Any:
        with torch.inference_mode(), convolutions_as_products():
            return self.model.encode(images)

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Raw latents (N, C, H, W) to images (N, 3, H', W') in [-1, 1]."""
        if self.model is None:
            return latents.float().clamp(-1, 1)
        with torch.autocast(latents.device.type, enabled=False), convolutions_as_products():
            return self.model.decode(latents.float()).sample.float().clamp(-1, 1)


def load_autoencoder(vae: dict[str, Any] | None, source: str | None = None, channels: int = 3) -> Autoencoder:
    """The VAE that a store's manifest or a checkpoint names; None there means that latents are pixels.

    Args:
        vae: the entry there: source and hash.
        source: where to load it from instead, for example a local copy.
        channels: of the latents. Only one or three are pixels; of others an old store may name no VAE.

    Raises:
        InputError: where it cannot be loaded, or its weights are not those that encoded the latents.
    """
    if vae is None and channels not in PIXEL_CHANNELS:
        if source in (None, PIXELS):
            raise InputError(
                f"latents of {channels} channels are no pixels, and nothing names their VAE: give it as vae"
            )
        vae = {"source": source}
    if vae is None and source not in (None, PIXELS):
        raise InputError(f"the latents of this store are pixels; remove the setting vae: {source!r}")
    try:
        loaded = Autoencoder(PIXELS if vae is None else source or vae["source"])
    except InputError as error:
        if source is not None:
            raise
        raise InputError(
            f"the latents name their VAE, but it is not where they say: {error}. Where it has moved, give its place "
            "now with --vae (in a configuration: vae, of the callback that decodes)"
            + ("; its weights are compared by their hash" if "hash" in vae else "")
        ) from error
    if vae is not None and "hash" in vae and (loaded.entry or {}).get("hash") != vae["hash"]:
        found = (loaded.entry or {}).get("hash", "none: pixels")
        raise InputError(
            f"the VAE {source or vae['source']!r} is not the one that encoded this store: its weights hash to "
            f"{found[:16]}..., the manifest says {vae['hash'][:16]}...; give the right one with the setting vae"
        )
    return loaded


def load_decoder(vae: dict[str, Any] | None, source: str | None, device: torch.device, channels: int = 3) -> Decoder:
    """The decoder of that VAE, on a device; arguments and errors as for :func:`load_autoencoder`."""
    return load_autoencoder(vae, source, channels).to(device).decode
