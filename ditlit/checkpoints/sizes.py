"""The sizes of a DiT from the shapes of its weights, where no configuration comes with them."""

import math
from typing import Any

import torch
from torch import Tensor

from ditlit.checkpoints.contents import CheckpointContents, Which, describe
from ditlit.diffusion import GaussianDiffusion, Process
from ditlit.errors import InputError
from ditlit.models import VARIANTS, DiT
from ditlit.models.embeddings import sincos_positions
from ditlit.settings import Reading

HEADS = {sizes["hidden_size"]: sizes["num_heads"] for sizes in VARIANTS.values()}
PAPER_VAE = "stabilityai/sd-vae-ft-ema"
PAPER_SCALE = 0.18215  # of Stable Diffusion's latents, to about unit variance


def from_shapes(
    state: dict[str, Tensor],
    reading: Reading,
    where: Any,
    weights: Which,
    format: str,
    vae: str = PAPER_VAE,
    process: Process | None = None,
) -> CheckpointContents:
    """Contents of bare weights under our names, ``state`` as :func:`rename` leaves it: with a convolution as the patch
    embedding or a linear layer, and with or without a position table.

    Weights with four channels are taken to see latents of Stable Diffusion's VAE, as the paper's do, others pixels; and
    where no process is given, to belong to the paper's.

    Raises:
        InputError: where the shapes contradict each other or leave a size open.
    """
    state = dict(state)
    table = state.pop("pos_embed", None)
    config = infer(state, None if table is None else table.shape[-2], reading, where)
    state["patch_embed.weight"] = state["patch_embed.weight"].flatten(1)
    if table is not None:
        table = table.reshape(table.shape[-2:])  # (T, D)
        if not is_fixed(table, config, where):
            config["positions"] = "learned"
            state["pos_embed"] = table
    return CheckpointContents(
        state=state,
        denoiser={"class_path": f"{DiT.__module__}.{DiT.__qualname__}", "init_args": config},
        process=describe(process or GaussianDiffusion()),
        latents=assumed_latents(config, vae),
        step=0,
        weights=weights,
        format=format,
    )


def infer(state: dict[str, Tensor], tokens: int | None, reading: Reading, where: Any) -> dict[str, Any]:
    """Constructor keywords of the DiT with these weights."""

    def shape(key: str) -> tuple[int, ...]:
        if key not in state:
            raise InputError(f"{where} has no {key!r}; it may be cut short, or hold no DiT")
        return tuple(state[key].shape)

    patch = shape("patch_embed.weight")
    width = patch[0]
    if len(patch) == 4:
        channels, patch_size = patch[1], patch[2]
    else:
        channels = reading.in_channels or 4
        patch_size = math.isqrt(patch[1] // channels)
        if channels * patch_size**2 != patch[1]:
            raise InputError(
                f"{where} has patches of {patch[1]} values; give in_channels (--in_channels), their number of channels"
            )
    num_heads = reading.num_heads or HEADS.get(width)
    if num_heads is None:
        widths = ", ".join(map(str, HEADS))
        raise InputError(
            f"{where} has width {width}, which is none of the paper's ({widths}); give num_heads (--num_heads), which "
            "shapes do not tell"
        )
    size = reading.input_size
    if size is None:
        if tokens is None:
            raise InputError(
                f"{where} has no position table to tell its input size; give input_size (--input_size 32 for 256px)"
            )
        side = math.isqrt(tokens)
        if side**2 != tokens:
            raise InputError(f"{where} has {tokens} tokens, which make no square; give input_size (--input_size)")
        size = side * patch_size
    outputs = shape("final.linear.weight")[0]
    depth = 1 + max((int(key.split(".")[1]) for key in state if key.startswith("blocks.")), default=-1)
    sizes = dict(depth=depth, hidden_size=width, num_heads=num_heads, patch_size=patch_size)
    return dict(
        variant=next((name for name, known in VARIANTS.items() if known == sizes), "DiT-XL/2"),
        input_size=size,
        in_channels=channels,
        num_classes=shape("label_embed.weight")[0] - 1,
        **sizes,
        mlp_ratio=shape("blocks.0.mlp.fc_in.weight")[0] / width,
        learn_sigma=outputs == 2 * channels * patch_size**2,
        positions="sincos",
        dropout=0.0,
        gradient_checkpointing=False,
        conditioning=design(state, width),
    )


def design(state: dict[str, Tensor], width: int) -> str:
    """How the blocks of these weights are conditioned."""
    if "blocks.0.cross.q.weight" in state:
        return "cross_attention"
    if "blocks.0.modulation.weight" not in state:
        return "in_context"
    return "adaln" if state["blocks.0.modulation.weight"].shape[0] == 4 * width else "adaln_zero"


def is_fixed(table: Tensor, config: dict[str, Any], where: Any) -> bool:
    """Whether a position table (T, D) is the paper's, up to its precision."""
    size = config["input_size"]
    grid = tuple(side // config["patch_size"] for side in ((size, size) if isinstance(size, int) else size))
    if tuple(table.shape) != (grid[0] * grid[1], config["hidden_size"]):
        needed = (grid[0] * grid[1], config["hidden_size"])
        raise InputError(f"{where} has 'pos_embed' with shape {tuple(table.shape)}, this model needs {needed}")
    expected = sincos_positions(config["hidden_size"], grid)
    return torch.allclose(table.float(), expected, rtol=0, atol=1e-5 if table.dtype == torch.float32 else 1e-2)


def assumed_latents(config: dict[str, Any], vae: str) -> dict[str, Any]:
    """Latents as the released weights see them; pixels where there are not four channels."""
    channels, size = config["in_channels"], config["input_size"]
    if channels != 4:
        return {"shift": [0.0] * channels, "scale": [1.0] * channels, "kind": "latents", "image_size": None,
                "preprocessing": None, "vae": None, "class_names": None}  # fmt: skip
    return {
        "shift": [0.0] * channels,
        "scale": torch.full((channels,), PAPER_SCALE).tolist(),  # float32, as in a training checkpoint
        "kind": "moments",
        "image_size": 8 * size if isinstance(size, int) else None,
        "preprocessing": None,
        "vae": {"class": "AutoencoderKL", "source": vae},
        "class_names": None,
    }
