"""The settings of ``ditlit convert``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ditlit.errors import InputError
from ditlit.settings.groups import Reading

SUFFIXES = {".ckpt": "ckpt", ".pt": "released", ".pth": "released", ".safetensors": "safetensors", "": "diffusers"}


@dataclass(frozen=True, kw_only=True)
class ConvertSettings:
    """Convert weights between our checkpoints, the released DiT format, diffusers and safetensors.

    Example: ditlit convert --source runs/xl2/checkpoints/last.ckpt --out xl2-pipeline --vae stabilityai/sd-vae-ft-ema

    Weights come back from every format bit for bit, but SiT's: its models are asked with 1 - t and answer -v, for which
    the first layer of the timestep embedding is changed, and that comes back to rounding. What is written holds one set
    of weights and no optimizer: train on from it with fit --model.init_from. Released files hold weights and nothing
    else; the other formats also keep the configuration, the step, and what is known of the latents.

    diffusers computes the timestep embedding with other frequencies than DiT does, so its copies of the timestep
    embedder are fitted anew, and the original is kept beside them. For DiT-L and DiT-XL the result is the same model
    to rounding, at whole timesteps; narrower ones are approximated, and the error of the embedding is printed. The
    stock DiTPipeline differs from DiT's sampling in three ways that no file can change: it drops the learned variance,
    it guides all channels, and its null class is 1000. The last is made right for models of up to 1000 classes.

    Args:
        source: a ditlit checkpoint, a file of released weights (also as saved in training, and by fast-DiT or SiT), a
            safetensors file, a diffusers folder, or the name of one on the Hugging Face hub.
        out: the file or folder to write; it appears when it is whole.
        to: the format; by default told from the name of ``out``: .ckpt, .pt, .safetensors, or a folder for diffusers.
            sit is a .pt file as SiT has them, for flows.
        weights: the moving average or the raw weights, where the source holds both.
        dtype: precision of the weights written.
        vae: folder or hub name of the VAE for a whole DiTPipeline; without it a folder for DiTTransformer2DModel alone
            is written.
        scheduler: of the pipeline: ddim, with DiT's timesteps; ddpm, with the posterior's variance; or dpm++.
        overwrite: replace what is at ``out``.

    Raises:
        InputError: where the format cannot hold what is asked for, or ``out`` exists.
    """

    source: str
    out: str
    to: Literal["ckpt", "released", "sit", "safetensors", "diffusers"] | None = None
    weights: Literal["ema", "raw"] = "ema"
    dtype: Literal["keep", "float32", "bfloat16", "float16"] = "keep"
    vae: str | None = None
    scheduler: Literal["ddim", "ddpm", "dpm++"] = "ddim"
    overwrite: bool = False
    reading: Reading = Reading()

    def __post_init__(self):
        if self.vae is not None and self.format != "diffusers":
            raise InputError(
                f"only a diffusers pipeline holds a VAE; remove vae or write a folder instead of {self.out}"
            )
        if Path(self.out).exists() and not self.overwrite:
            raise InputError(f"{self.out} exists already; choose another place or set overwrite to true")

    @property
    def format(self) -> str:
        """That is written."""
        return self.to or SUFFIXES.get(Path(self.out).suffix, "diffusers")
