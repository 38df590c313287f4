"""The settings of ``ditlit encode``."""

from dataclasses import dataclass
from typing import Literal

from ditlit.errors import InputError, check_positive
from ditlit.settings.groups import Execution


@dataclass(frozen=True, kw_only=True)
class EncodeSettings:
    """Encode images to a latent store.

    Example: ditlit encode --images /data/imagenet/train --out /data/imagenet256-latents
    --vae stabilityai/sd-vae-ft-ema

    Continues where an earlier run was stopped, and ends with the same bytes on any number of devices. At the end it
    prints what the store holds and draws contact-sheet.png, originals beside their decodes.

    Args:
        images: folder with one folder of images for each class, a tar archive or folder of archives (webdataset), or a
            folder with a labels file.
        out: folder or URL (s3://, gs://, hf://) of the store.
        vae: folder or hub name of a diffusers autoencoder (AutoencoderKL, AutoencoderTiny, AutoencoderDC), or
            ``pixels`` for none.
        image_size: side in pixels of the square that is cut from the middle of each image.
        flips: encode mirrored images too, which is not the same as mirroring latents.
        batch_size: images that the VAE encodes at once on each device.
        precision: in which the VAE computes.
        dtype: in which latents are stored.
        normalize: shift and scale of the latents: the VAE's own factors, or the measured mean and standard deviation of
            each channel.
        labels: CSV file of image name and class, or StyleGAN's dataset.json; by default labels.csv or dataset.json in
            the folder, where there is one. Classes that are numbers (here and in .cls and .json files) mean themselves,
            from 0 on; numbers from 1 to K are counted from 0 and kept as names, and 007 is a name.
        within: encode only what lies in this folder of the tree or the archives.
        skip_broken: leave out images that cannot be decoded, instead of ending with an error that names them.
        shard_size: images in one file of the store.
        shuffle: write images in a random order, so that readers of a few shards see all classes.
        num_workers: processes on each device that decode images; by default one for each CPU core but one.
        verify: instead of encoding, check every checksum, shape, label and number of this store.

    Raises:
        InputError: for settings that make no sense.
    """

    images: str | None = None
    out: str | None = None
    vae: str | None = None
    image_size: int = 256
    flips: bool = True
    batch_size: int = 64
    precision: Literal["32", "bf16", "fp16"] = "bf16"
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    normalize: Literal["vae", "channel"] = "vae"
    labels: str | None = None
    within: str | None = None
    skip_broken: bool = False
    shard_size: int = 4096
    shuffle: bool = True
    num_workers: int | None = None
    verify: str | None = None
    execution: Execution = Execution()

    def __post_init__(self):
        if self.verify is not None:
            return
        for name in ("images", "out", "vae"):
            if getattr(self, name) is None:
                raise InputError(f"encode needs --{name}; see ditlit encode --help")
        check_positive(image_size=self.image_size, batch_size=self.batch_size, shard_size=self.shard_size)
