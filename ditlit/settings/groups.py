"""Settings that several commands share."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ditlit.errors import check_positive

Classes = list[str | int] | str | int  # what a setting that names classes takes


@dataclass(frozen=True)
class Execution:
    """Where a command runs.

    Args:
        accelerator: cpu, gpu, or auto.
        devices: number of devices of this machine, or auto: all GPUs, or one process on the CPU.
        num_nodes: number of machines.
    """

    accelerator: str = "auto"
    devices: str = "auto"
    num_nodes: int = 1


@dataclass(frozen=True)
class Reading:
    """How a checkpoint is read: what it may not tell, and whose code it may name.

    Args:
        num_heads: attention heads, for bare weights whose width is none of the paper's.
        input_size: side, or height and width, of the latents, for bare weights without a square position table.
        in_channels: channels of the latents, for bare weights under our names; 4 by default.
        process: for bare weights under the released names, which DiT, SiT and REPA share: ddpm (by default), or sit or
            repa for flows, whose weights are read for :class:`ditlit.diffusion.RectifiedFlow`.
        trust: packages, modules or classes of your own, separated by commas or as a list, which the checkpoint may name
            as its denoiser or process: they are imported.
    """

    num_heads: int | None = None
    input_size: int | tuple[int, int] | None = None
    in_channels: int | None = None
    process: Literal["ddpm", "sit", "repa"] | None = None
    trust: str | Sequence[str] | None = None


@dataclass(frozen=True)
class Drawing:
    """With which weights images are drawn, and on how much of a device.

    Args:
        weights: the moving average, or those that the optimizer holds.
        labels: where a number of images is asked for, whether the classes take turns or are drawn at random.
        seed: of all noise.
        batch_size: images drawn at once on each device.
        precision: of the denoiser; by default tf32 on GPUs and 32 on CPUs. tf32 is float32 with fast matrix products,
            in the VAE too, which is float32 otherwise.
        compile: compile the denoiser, which pays for many images.
        vae: folder or hub name of the VAE, instead of the one that the checkpoint names.
        decode_batch_size: images decoded at once.
        vae_tiling: decode in tiles, where memory is short; seams may show.

    Raises:
        InputError: for a size below 1.
    """

    weights: Literal["ema", "raw"] = "ema"
    labels: Literal["balanced", "random"] = "balanced"
    seed: int = 0
    batch_size: int = 32
    precision: Literal["32", "tf32", "bf16", "fp16"] | None = None
    compile: bool = False
    vae: str | None = None
    decode_batch_size: int = 16
    vae_tiling: bool = False

    def __post_init__(self):
        check_positive(batch_size=self.batch_size, decode_batch_size=self.decode_batch_size)


@dataclass(frozen=True)
class Judging:
    """By what images are compared with a reference.

    Args:
        metrics: which, separated by commas: fid, sfid, is, precision, recall, kid. By default all that the extractor
            serves.
        extractor: inception, dinov2, or the class path of another one, whose distances carry its name and are no FID.
        inception_weights: file of Inception's weights; by default the one in torch's hub cache.
        reference_size: cut and resize the reference's images to this side, as encode does. Published numbers do not.

    Raises:
        InputError: for a size below 1.
    """

    metrics: str | None = None
    extractor: str = "inception"
    inception_weights: str | None = None
    reference_size: int | None = None

    def __post_init__(self):
        check_positive(reference_size=self.reference_size)
