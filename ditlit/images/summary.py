"""What a freshly encoded store holds, in numbers and as a picture."""

import io
import json
import math

import numpy as np
import safetensors.torch
import torch
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from ditlit.data.folders import Folder
from ditlit.data.manifest import Manifest
from ditlit.errors import counted
from ditlit.images.decoding import preprocess
from ditlit.images.encoding import Written
from ditlit.images.sources import ImageSource
from ditlit.images.vae import Autoencoder
from ditlit.pictures import grid_of, to_uint8

ROUND_TRIPS = 8
CONTACT_SHEET = "contact-sheet.png"
SUMMARY = "summary.json"


def summarize(
    folder: Folder,
    manifest: Manifest,
    written: list[Written],
    source: ImageSource,
    shards: dict[int, np.ndarray],
    vae: Autoencoder,
    device: torch.device,
) -> None:
    """Print what a store holds, and write it to ``summary.json`` and ``contact-sheet.png`` in the store.

    Args:
        folder: of the store.
        manifest: of the store.
        written: its shards.
        source: of the images.
        shards: numbers of each shard's images.
        vae: that encoded them.
        device: of the VAE.
    """
    counts = torch.cat([shard.labels for shard in written]).bincount(minlength=manifest.num_classes).tolist()
    names = manifest.class_names or [str(i) for i in range(manifest.num_classes)]
    positions = manifest.num_samples * (1 + manifest.flipped) * math.prod(manifest.shape[1:])
    mean, square = sum(shard.sums for shard in written) / positions
    std = np.sqrt(square - mean**2)
    scaled_mean, scaled_std = (mean - manifest.shift) * manifest.scale, std * manifest.scale
    num_bytes = sum(shard.num_bytes for shard in manifest.shards)
    enlarged = sum(shard.enlarged for shard in written)
    originals, decoded = round_trips(folder, written, source, shards, vae, manifest.image_size, device)
    psnr = [peak_signal_to_noise(a, b) for a, b in zip(originals, decoded, strict=True)]
    save_contact_sheet(folder, originals, decoded)
    about = {
        "samples": manifest.num_samples,
        "bytes": num_bytes,
        "enlarged": enlarged,
        "samples_per_class": dict(zip(names, counts, strict=True)),
        "latent_mean": mean.tolist(),
        "latent_std": std.tolist(),
        "scaled_mean": scaled_mean.tolist(),
        "scaled_std": scaled_std.tolist(),
        "round_trip_psnr_db": psnr,
    }
    folder.write(SUMMARY, json.dumps(about, indent=1).encode())
    few, many = int(np.argmin(counts)), int(np.argmax(counts))
    sizes = counted(counts[many], "image")
    if counts[few] < counts[many]:
        sizes = f"{counts[few]:,} ({names[few]}) to {sizes} ({names[many]})"
    flips = " with their mirror images" if manifest.flipped else ""
    c, h, w = manifest.shape
    if enlarged:
        print(f"{counted(enlarged, 'image')} enlarged, whose shorter side has less than {manifest.image_size} pixels")
    print(
        f"{counted(manifest.num_samples, 'image')}{flips} as {manifest.kind} of {c}x{h}x{w}, {num_bytes / 1e9:.3f} GB "
        f"in {counted(len(manifest.shards), 'shard')}\n"
        f"{counted(manifest.num_classes, 'class')} of {sizes}\n"
        f"latents: mean {numbers(mean)}, std {numbers(std)}; what a model sees: mean {numbers(scaled_mean)}, std "
        f"{numbers(scaled_std)}\n"
        f"round trip: PSNR {np.mean(psnr):.1f} dB over {counted(len(psnr), 'image')} ({min(psnr):.1f} to "
        f"{max(psnr):.1f})\n"
        f"Look at them beside the originals: {folder.location(CONTACT_SHEET)}"
    )


def numbers(values: np.ndarray) -> str:
    return " ".join(f"{value:.3f}" for value in values)


def round_trips(
    folder: Folder,
    written: list[Written],
    source: ImageSource,
    shards: dict[int, np.ndarray],
    vae: Autoencoder,
    image_size: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Some images and what their stored latents decode to: bytes (n, 3, S, S) each."""
    number, first = next((i, shard) for i, shard in enumerate(written) if len(shard.labels))
    kept = [i for i in shards[number].tolist() if source.name(i) not in first.skipped][:ROUND_TRIPS]
    originals = torch.stack([preprocess(source.read(i), image_size) for i in kept])
    latents = safetensors.torch.load(folder.read(first.shard.file))[vae.kind][: len(kept)]
    if vae.kind == "moments":
        latents = latents.chunk(2, dim=1)[0]
    decoded = [to_uint8(vae.decode(one[None].to(device))).cpu() for one in latents]  # one by one: memory
    return originals, torch.cat(decoded)


def peak_signal_to_noise(image: Tensor, other: Tensor) -> float:
    """PSNR of two byte images in dB, at most that of one wrong grey level in the whole picture."""
    error = (image.double() - other.double()).square().sum().clamp_min(1) / image.numel()
    return float(10 * torch.log10(255**2 / error))


def save_contact_sheet(folder: Folder, originals: Tensor, decoded: Tensor) -> None:
    """Each original with its decode to the right, four pairs a row."""
    pairs = torch.stack([originals, decoded], 1).flatten(0, 1)
    file = io.BytesIO()
    to_pil_image(grid_of(pairs, 8, min_side=1)).save(file, format="PNG")
    folder.write(CONTACT_SHEET, file.getvalue())
