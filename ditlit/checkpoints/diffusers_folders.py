"""diffusers folders: a DiTTransformer2DModel, or a whole DiTPipeline around one."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ditlit.checkpoints.contents import CheckpointContents, as_dit
from ditlit.checkpoints.names import from_diffusers, to_diffusers
from ditlit.checkpoints.safetensors_files import save, tensors_and_entry
from ditlit.checkpoints.sizes import from_shapes
from ditlit.checkpoints.timesteps import MLP, fingerprint, refitted
from ditlit.checkpoints.torch_files import plain_data
from ditlit.errors import InputError
from ditlit.settings import Reading

CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")  # the released pipelines name the second, their old class
WEIGHTS = "diffusion_pytorch_model"
ORIGINAL = "ditlit.safetensors"  # what diffusers cannot hold: the timestep embedder as it was, and where it comes from
PIPELINE_NULL_CLASS = 1000  # DiTPipeline's, whatever the model
# An argument that DiTTransformer2DModel takes and ignores, 32 by default. It survives a save_pretrained, and tells
# embedders that were fitted to diffusers' frequencies from those of a DiT.
FITTED = {"norm_num_groups": 127}


def read_pipeline(folder: Path) -> CheckpointContents:
    """Read the folder of a DiTPipeline, in errors as :func:`read_transformer`."""
    index = json_file(folder / "model_index.json")
    if index.get("_class_name") != "DiTPipeline":
        raise InputError(f"{folder} is a {index.get('_class_name')}, not a DiTPipeline")
    contents = read_transformer(folder / "transformer")
    if not (folder / "transformer" / ORIGINAL).is_file():
        contents.latents |= pipeline_latents(folder, index, contents)
    contents.format = "diffusers pipeline"
    return contents


def read_transformer(folder: Path) -> CheckpointContents:
    """Read the folder of a DiTTransformer2DModel.

    A folder that did not come from ditlit holds a DiT's timestep embedder unchanged, as facebook/DiT-XL-2-256 does,
    and is read so: the result is the original model, of which diffusers itself computes an approximation.

    Raises:
        InputError: where it is no such folder, or its model is no DiT.
    """
    config = json_file(folder / "config.json")
    if config.get("_class_name") not in CLASSES or config.get("norm_type", "ada_norm_zero") != "ada_norm_zero":
        raise InputError(f"{folder} holds a {config.get('_class_name')}, not a {CLASSES[0]}")
    state = from_diffusers(read_weights(folder))
    if (folder / ORIGINAL).is_file():
        return restored(state, folder)
    if config.get("norm_num_groups") == FITTED["norm_num_groups"]:
        raise InputError(
            f"{folder} was exported by ditlit and saved again by diffusers: its timestep embedder is fitted to "
            f"diffusers' frequencies and the original, {ORIGINAL}, is gone; convert the first export instead"
        )
    heads, size = config.get("num_attention_heads", 16), config.get("attention_head_dim", 72)
    reading = Reading(num_heads=heads, input_size=config.get("sample_size", 32))
    contents = from_shapes(state, reading, folder, "unknown", "diffusers transformer")
    if heads * size != contents.config["hidden_size"]:
        raise InputError(
            f"{folder / 'config.json'} gives {heads} heads of {size}, but the weights are "
            f"{contents.config['hidden_size']} wide"
        )
    return contents


def restored(state: dict[str, Tensor], model: Path) -> CheckpointContents:
    """The contents that ditlit exported to a folder, bit for bit."""
    original, about = tensors_and_entry(model / ORIGINAL)
    if about is None or not set(MLP) <= set(state) or fingerprint(state) != about.pop("fitted"):
        raise InputError(
            f"{model} changed after ditlit exported it: its timestep embedder is not the one that {ORIGINAL} belongs "
            "to; convert the export instead"
        )
    contents = CheckpointContents(state=state | original, format="diffusers transformer", **about)
    contents.state["label_embed.weight"] = state["label_embed.weight"][: contents.config["num_classes"] + 1]
    contents.state["patch_embed.weight"] = state["patch_embed.weight"].flatten(1)
    return contents


def read_weights(model: Path) -> dict[str, Tensor]:
    """All weights of a model's folder, in one file or several."""
    if (model / f"{WEIGHTS}.safetensors").is_file():
        return tensors_and_entry(model / f"{WEIGHTS}.safetensors")[0]
    if (model / f"{WEIGHTS}.safetensors.index.json").is_file():
        names = set(json_file(model / f"{WEIGHTS}.safetensors.index.json")["weight_map"].values())
        parts = [tensors_and_entry(model / Path(name).name)[0] for name in sorted(names)]
        return {key: value for part in parts for key, value in part.items()}
    if (model / f"{WEIGHTS}.bin").is_file():
        return plain_data(model / f"{WEIGHTS}.bin")
    raise InputError(f"{model} has no {WEIGHTS}.safetensors")


def pipeline_latents(folder: Path, index: dict[str, Any], contents: CheckpointContents) -> dict[str, Any]:
    """What a pipeline says of its latents: by its VAE's configuration, and by its class names."""
    channels = contents.config["in_channels"]
    vae = json_file(folder / "vae" / "config.json")
    factor = 2 ** (len(vae.get("block_out_channels", (1, 2, 3, 4))) - 1)
    labels = index.get("id2label") or {}
    known = set(labels) == {str(i) for i in range(contents.config["num_classes"])}
    return {
        "shift": torch.full((channels,), float(vae.get("shift_factor") or 0)).tolist(),
        "scale": torch.full((channels,), float(vae.get("scaling_factor") or 1)).tolist(),
        "kind": "moments" if vae["_class_name"] == "AutoencoderKL" else "latents",
        "image_size": factor * contents.config["input_size"],
        "vae": {"class": vae["_class_name"], "source": str(folder / "vae")},
        "class_names": [labels[str(i)] for i in range(len(labels))] if known else None,
    }


def write_transformer(contents: CheckpointContents, folder: Path) -> float:
    """Write a DiTTransformer2DModel folder.

    Labels beyond the null class, up to diffusers' fixed null class 1000, are reading its row, so that DiTPipeline's
    guidance works with any number of classes up to 1000.

    Returns:
        The relative error of the timestep embedder; see :mod:`ditlit.checkpoints.timesteps`.

    Raises:
        InputError: for what diffusers' class cannot hold.
    """
    model = as_dit(contents, "diffusers' DiTTransformer2DModel")
    config = contents.config
    height, width = model.input_size
    if height != width:
        raise InputError(f"diffusers' DiT knows square latents only, not {height}x{width}")
    if isinstance(model.pos_embed, nn.Parameter):
        raise InputError("diffusers' DiT computes fixed positions and cannot hold a learned table")
    if config["mlp_ratio"] != 4:
        raise InputError(f"diffusers' DiT has MLPs 4 times as wide as its tokens, not {config['mlp_ratio']} times")
    fitted, error = refitted(contents.state, contents.process["init_args"]["num_timesteps"])
    labels = contents.state["label_embed.weight"]
    spare = max(PIPELINE_NULL_CLASS + 1 - len(labels), 0)
    labels = torch.cat([labels, labels[-1:].expand(spare, -1)])
    state = to_diffusers(contents.state | fitted | {"label_embed.weight": labels}, model.patch_size, config["depth"])

    folder.mkdir(parents=True)
    save(state, None, folder / f"{WEIGHTS}.safetensors")
    original = {name: contents.state[name] for name in MLP}
    save(original, contents.about() | {"fitted": fingerprint(fitted)}, folder / ORIGINAL)
    write_json(
        folder / "config.json",
        {
            "_class_name": CLASSES[0],
            "_diffusers_version": version("diffusers"),
            "num_attention_heads": config["num_heads"],
            "attention_head_dim": config["hidden_size"] // config["num_heads"],
            "in_channels": config["in_channels"],
            "out_channels": model.out_channels,
            "num_layers": config["depth"],
            "dropout": config["dropout"],
            "attention_bias": True,
            "sample_size": height,
            "patch_size": model.patch_size,
            "activation_fn": "gelu-approximate",
            "num_embeds_ada_norm": len(labels) - 1,
            "upcast_attention": False,
            "norm_type": "ada_norm_zero",
            "norm_elementwise_affine": False,
            "norm_eps": 1e-6,
            **FITTED,
        },
    )
    return error


def json_file(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"there is no {path}; is this a diffusers folder?") from None
    except ValueError as error:
        raise InputError(f"{path} is damaged: {error}") from None


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
