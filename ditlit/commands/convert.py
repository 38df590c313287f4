"""``ditlit convert``: weights from and to the formats that people have."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ditlit.checkpoints import CheckpointContents, read
from ditlit.checkpoints.atomic import replacing
from ditlit.checkpoints.contents import skeleton, variant_name
from ditlit.checkpoints.diffusers_folders import write_transformer
from ditlit.checkpoints.pipeline import write_pipeline
from ditlit.checkpoints.safetensors_files import write_safetensors
from ditlit.checkpoints.torch_files import write_released, write_sit, write_training
from ditlit.data.folders import check_writable
from ditlit.errors import InputError, counted
from ditlit.images.vae import load_vae, weights_hash
from ditlit.models import DiT, num_parameters
from ditlit.settings.convert import ConvertSettings

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def convert(settings: ConvertSettings) -> None:
    """See :class:`ConvertSettings`."""
    source, out, vae, dtype, to = settings.source, settings.out, settings.vae, settings.dtype, settings.format
    path = Path(out)
    check_writable(path.parent, "--out")
    contents = read(source, settings.weights, **asdict(settings.reading))
    print(f"read {source}: {summary(contents, settings.reading.trust)}", flush=True)
    if dtype != "keep":
        contents.state = {key: value.to(DTYPES[dtype]) for key, value in contents.state.items()}
    with replacing(path, settings.overwrite) as temporary:
        if to == "diffusers":
            notes = write_diffusers(contents, temporary, vae, settings.scheduler)
        else:
            write, notes = WRITERS[to]
            write(contents, temporary)
    precision = ", ".join(sorted({str(value.dtype).removeprefix("torch.") for value in contents.state.values()}))
    print(f"wrote {out}: {to}, {precision}")
    for note in notes:
        print(f"  {note}")


WRITERS: dict[str, tuple[Callable[[CheckpointContents, Path], None], list[str]]] = {
    "ckpt": (write_training, ["no optimizer is in it: train on with fit --model.init_from, not --ckpt_path"]),
    "released": (write_released, ["weights alone: process, latents, class names and step have no place in it"]),
    "safetensors": (write_safetensors, []),
    "sit": (write_sit, ["weights alone: latents, class names and step have no place in it"]),
}


def write_diffusers(contents: CheckpointContents, folder: Path, vae: str | None, scheduler: str) -> list[str]:
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


def matching_vae(contents: CheckpointContents, source: str) -> Any:
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


def summary(contents: CheckpointContents, trust: str | Sequence[str] | None) -> str:
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
