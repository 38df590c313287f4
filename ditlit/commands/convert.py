"""``ditlit convert``: weights from and to the formats that people have."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Unpack

import torch

from ditlit.checkpoints import Contents, Reading, read
from ditlit.checkpoints.atomic import replacing
from ditlit.checkpoints.contents import skeleton, variant_name
from ditlit.checkpoints.diffusers_folders import write_transformer
from ditlit.checkpoints.pipeline import write_pipeline
from ditlit.checkpoints.safetensors_files import write_safetensors
from ditlit.checkpoints.torch_files import write_released, write_training
from ditlit.data.folders import check_writable
from ditlit.errors import InputError, counted
from ditlit.images.vae import load_vae, weights_hash
from ditlit.models import DiT, num_parameters

SUFFIXES = {".ckpt": "ckpt", ".pt": "released", ".pth": "released", ".safetensors": "safetensors", "": "diffusers"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def convert(
    source: str,
    out: str,
    to: Literal["ckpt", "released", "safetensors", "diffusers"] | None = None,
    weights: Literal["ema", "raw"] = "ema",
    dtype: Literal["keep", "float32", "bfloat16", "float16"] = "keep",
    vae: str | None = None,
    scheduler: Literal["ddim", "ddpm", "dpm++"] = "ddim",
    overwrite: bool = False,
    **reading: Unpack[Reading],
) -> None:
    """Convert weights between our checkpoints, the released DiT format, diffusers and safetensors.

    Example: ditlit convert --source runs/xl2/checkpoints/last.ckpt --out xl2-pipeline --vae stabilityai/sd-vae-ft-ema

    Weights come back from every format bit for bit. What is written holds one set of weights and no optimizer: train
    on from it with fit --model.init_from. Released files hold weights and nothing else; the other formats also keep
    the configuration, the step, and what is known of the latents.

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
        weights: the moving average or the raw weights, where the source holds both.
        dtype: precision of the weights written.
        vae: folder or hub name of the VAE for a whole DiTPipeline; without it a folder for DiTTransformer2DModel alone
            is written.
        scheduler: of the pipeline: ddim, with DiT's timesteps; ddpm, with the posterior's variance; or dpm++.
        overwrite: replace what is at ``out``.
        reading: how the source is read, as for ``ditlit.checkpoints.load``.

    Raises:
        InputError: where the source cannot be read, the format cannot hold it, or ``out`` exists.
    """
    path = Path(out)
    to = to or SUFFIXES.get(path.suffix, "diffusers")
    if vae is not None and to != "diffusers":
        raise InputError(f"only a diffusers pipeline holds a VAE; remove vae or write a folder instead of {out}")
    if path.exists() and not overwrite:  # before the source is read, which may take a while
        raise InputError(f"{path} exists already; choose another place or set overwrite to true")
    check_writable(path.parent, "--out")
    contents = read(source, weights, **reading)
    print(f"read {source}: {summary(contents, reading.get('trust'))}", flush=True)
    if dtype != "keep":
        contents.state = {key: value.to(DTYPES[dtype]) for key, value in contents.state.items()}
    with replacing(path, overwrite) as temporary:
        if to == "diffusers":
            notes = write_diffusers(contents, temporary, vae, scheduler)
        else:
            write, notes = WRITERS[to]
            write(contents, temporary)
    precision = ", ".join(sorted({str(value.dtype).removeprefix("torch.") for value in contents.state.values()}))
    print(f"wrote {out}: {to}, {precision}")
    for note in notes:
        print(f"  {note}")


WRITERS: dict[str, tuple[Callable[[Contents, Path], None], list[str]]] = {
    "ckpt": (write_training, ["no optimizer is in it: train on with fit --model.init_from, not --ckpt_path"]),
    "released": (write_released, ["weights alone: process, latents, class names and step have no place in it"]),
    "safetensors": (write_safetensors, []),
}


def write_diffusers(contents: Contents, folder: Path, vae: str | None, scheduler: str) -> list[str]:
    """Write a transformer's folder, or a pipeline's where there is a VAE; returns what to know about it."""
    if vae is None:
        error = write_transformer(contents, folder)
        notes = ["a folder for DiTTransformer2DModel.from_pretrained; give vae for a whole DiTPipeline"]
    else:
        error = write_pipeline(contents, folder, matching_vae(contents, vae), scheduler)
        notes = ["a folder for DiTPipeline.from_pretrained"]
        if contents.config["num_classes"] > 1000:
            notes.append("DiTPipeline takes class 1000 for the null class, which it is not here: do not use guidance")
    return [*notes, f"timestep embedding in diffusers: {error:.1e} of it differs from the model's"]


def matching_vae(contents: Contents, source: str) -> Any:
    """The VAE of a pipeline, checked against the one that the latents come from."""
    known = contents.latents.get("vae", {})
    if known is None:
        raise InputError("this model draws pixels, which diffusers' DiTPipeline cannot: remove vae")
    inside = Path(source) / "vae"
    vae = load_vae(str(inside) if inside.is_dir() else source)
    if "hash" in known and (found := weights_hash(vae)) != known["hash"]:
        raise InputError(
            f"the VAE {source!r} is not the one that the model was trained with: its weights hash to {found[:16]}..., "
            f"those of {known.get('source')} to {known['hash'][:16]}..."
        )
    return vae


def summary(contents: Contents, trust: str | Sequence[str] | None) -> str:
    """Format, weights, variant, parameters, classes and input size in one line."""
    model = skeleton(contents.denoiser, trust)
    height, width = model.input_size
    parameters = num_parameters(model) if isinstance(model, DiT) else sum(p.numel() for p in model.parameters())
    which = "" if contents.weights == "unknown" else f"{contents.weights} weights, "
    name = variant_name(contents.config) if isinstance(model, DiT) else contents.denoiser["class_path"]
    return (
        f"{contents.format}, {which}{name}, {parameters:,} parameters, {counted(model.num_classes, 'class')}, input "
        f"{model.in_channels}x{height}x{width}" + (f", step {contents.step}" if contents.step else "")
    )
