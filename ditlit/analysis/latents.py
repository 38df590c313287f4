"""What the latents of a store are like, and what decoding and mirroring does to them."""

from typing import NamedTuple

import torch
from torch import Tensor

from ditlit.images.summary import peak_signal_to_noise
from ditlit.images.vae import Autoencoder
from ditlit.pictures import to_uint8


class ChannelStatistics(NamedTuple):
    """Of every channel, each (C,).

    Attributes:
        mean, std: over samples and places.
        lowest, highest: values.
    """

    mean: Tensor
    std: Tensor
    lowest: Tensor
    highest: Tensor


def channel_statistics(latents: Tensor) -> ChannelStatistics:
    """Statistics of latents (N, C, H, W), summed in float64."""
    values = latents.double().transpose(0, 1).flatten(1)  # (C, N*H*W)
    return ChannelStatistics(values.mean(1), values.std(1, correction=0), values.amin(1), values.amax(1))


def round_trips(autoencoder: Autoencoder, latents: Tensor, passes: int = 2) -> tuple[Tensor, list[float]]:
    """Decode raw latents (N, C, H, W), encode the pictures again, and so on.

    Returns:
        Bytes (passes + 1, N, 3 or 1, H', W'), the first as the latents decode; and of each pass the mean PSNR in dB
        between these and its pictures, at most that of one wrong grey level in a whole picture.
    """
    pictures = [to_uint8(autoencoder.decode(latents)).cpu()]
    for _ in range(passes):
        again = autoencoder.encode(pictures[-1].to(latents.device))
        again = again.chunk(2, dim=1)[0] if autoencoder.kind == "moments" else again
        pictures.append(to_uint8(autoencoder.decode(again)).cpu())
    return torch.stack(pictures), [mean_psnr(pictures[0], later) for later in pictures[1:]]


def mirrored(autoencoder: Autoencoder, latents: Tensor) -> tuple[Tensor, Tensor, float]:
    """What mirrored latents decode to beside the mirrored pictures: bytes (N, 3 or 1, H', W') each.

    Also the mean PSNR in dB between the two. A VAE is not symmetric: it is far below that of a round trip.
    """
    of_latents = to_uint8(autoencoder.decode(latents.flip(-1))).cpu()
    of_pictures = to_uint8(autoencoder.decode(latents)).flip(-1).cpu()
    return of_latents, of_pictures, mean_psnr(of_pictures, of_latents)


def mean_psnr(images: Tensor, others: Tensor) -> float:
    values = [peak_signal_to_noise(image, other) for image, other in zip(images, others, strict=True)]
    return sum(values) / len(values)
