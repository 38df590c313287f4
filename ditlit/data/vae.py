"""From latents back to pictures: the VAE that a store was encoded with, through diffusers, or none for pixels."""

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ditlit.errors import InputError

# Raw latents (N, C, H, W) -> images (N, 3 or 1, H', W') in [-1, 1].
Decoder = Callable[[Tensor], Tensor]


def load_vae(source: str) -> nn.Module:
    """A frozen diffusers autoencoder from a local folder or, where the hub can be reached, by its name there.

    Raises:
        InputError: where it cannot be loaded, with the remedy.
    """
    from diffusers import AutoModel  # slow to import, and only needed for latents

    try:
        vae = AutoModel.from_pretrained(source)
    except Exception as error:
        raise InputError(
            f"cannot load the VAE {source!r} ({type(error).__name__}: {error}). Give a folder that holds a diffusers "
            "autoencoder (config.json and diffusion_pytorch_model.safetensors) or a name on a hub that can be reached"
        ) from error
    return vae.eval().requires_grad_(False)


def weights_hash(module: nn.Module) -> str:
    """SHA-256 of the names, shapes, types and bytes of a module's weights."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def load_decoder(vae: dict[str, Any] | None, source: str | None, device: torch.device) -> Decoder:
    """The decoder of the VAE that a store's manifest names; None there means that latents are pixels.

    Args:
        vae: the manifest's entry: source and hash.
        source: where to load it from instead, for example a local copy.
        device: to decode on.

    Raises:
        InputError: where it cannot be loaded, or its weights are not those that encoded the store.
    """
    if vae is None:
        if source is not None:
            raise InputError(f"the latents of this store are pixels; remove the setting vae: {source!r}")
        return lambda latents: latents.clamp(-1, 1)
    model = load_vae(source or vae["source"])
    if "hash" in vae and (found := weights_hash(model)) != vae["hash"]:
        raise InputError(
            f"the VAE {source or vae['source']!r} is not the one that encoded this store: its weights hash to "
            f"{found[:16]}..., the manifest says {vae['hash'][:16]}...; give the right one with the setting vae"
        )
    model.to(device)

    def decode(latents: Tensor) -> Tensor:
        return model.decode(latents.to(model.dtype)).sample.float().clamp(-1, 1)

    return decode


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] as bytes, rounded: truncating would darken every picture by half a grey level."""
    return (127.5 * images + 128).clamp(0, 255).to(torch.uint8)
