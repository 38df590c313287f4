"""Key names: ours, those of the released DiT weights, and those of diffusers."""

import re

import torch
from torch import Tensor

from ditlit.errors import InputError

# Their layer: our layer. N stands for the number of a block.
RELEASED = {
    "x_embedder.proj": "patch_embed",
    "t_embedder.mlp.0": "time_embed.mlp.0",
    "t_embedder.mlp.2": "time_embed.mlp.2",
    "y_embedder.embedding_table": "label_embed",
    "blocks.N.attn.qkv": "blocks.N.attn.qkv",
    "blocks.N.attn.proj": "blocks.N.attn.out",
    "blocks.N.mlp.fc1": "blocks.N.mlp.fc_in",
    "blocks.N.mlp.fc2": "blocks.N.mlp.fc_out",
    "blocks.N.adaLN_modulation.1": "blocks.N.modulation",
    "final_layer.adaLN_modulation.1": "final.modulation",
    "final_layer.linear": "final.linear",
}
DIFFUSERS = {
    "pos_embed.proj": "patch_embed",
    "transformer_blocks.N.norm1.emb.timestep_embedder.linear_1": "blocks.N.time_embed.mlp.0",
    "transformer_blocks.N.norm1.emb.timestep_embedder.linear_2": "blocks.N.time_embed.mlp.2",
    "transformer_blocks.N.norm1.emb.class_embedder.embedding_table": "blocks.N.label_embed",
    "transformer_blocks.N.norm1.linear": "blocks.N.modulation",
    "transformer_blocks.N.attn1.to_q": "blocks.N.attn.q",
    "transformer_blocks.N.attn1.to_k": "blocks.N.attn.k",
    "transformer_blocks.N.attn1.to_v": "blocks.N.attn.v",
    "transformer_blocks.N.attn1.to_out.0": "blocks.N.attn.out",
    "transformer_blocks.N.ff.net.0.proj": "blocks.N.mlp.fc_in",
    "transformer_blocks.N.ff.net.2": "blocks.N.mlp.fc_out",
    "proj_out_1": "final.modulation",
    "proj_out_2": "final.linear",
}
WRAPPERS = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
EMBEDDERS = ("time_embed.mlp.0.weight", "time_embed.mlp.0.bias", "time_embed.mlp.2.weight", "time_embed.mlp.2.bias",
             "label_embed.weight")  # fmt: skip


def rename(state: dict[str, Tensor], layers: dict[str, str], what: str) -> dict[str, Tensor]:
    """Rename the layer of every key.

    Raises:
        InputError: for a key whose layer is not in the table: ``what`` says what it is not a key of.
    """
    renamed = {}
    for key, value in state.items():
        layer, _, leaf = key.rpartition(".")
        block = re.match(r"((?:transformer_)?blocks)\.(\d+)\.", layer)
        if block:
            layer = f"{block[1]}.N.{layer[block.end() :]}"
        if layer not in layers:
            raise InputError(f"{key!r} is not a key of {what}")
        name = layers[layer]
        if block:
            name = name.replace(".N.", f".{block[2]}.", 1)
        renamed[f"{name}.{leaf}"] = value
    return renamed


def inverse(layers: dict[str, str]) -> dict[str, str]:
    return {ours: theirs for theirs, ours in layers.items()}


def unwrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keys without what wrappers of a module put in front of them."""
    for wrapper in WRAPPERS * 2:
        if state and all(key.startswith(wrapper) for key in state):
            state = {key.removeprefix(wrapper): value for key, value in state.items()}
    return state


def from_released(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename released DiT weights to ours.

    The patch embedding is a convolution there and a linear layer here; the fixed position table is dropped, since it is
    computed from the sizes.

    Raises:
        InputError: for a key that no released DiT has.
    """
    state = {key: value for key, value in state.items() if key != "pos_embed"}
    ours = rename(state, RELEASED, "the released DiT weights")
    return ours | {key: value.flatten(1) for key, value in ours.items() if key == "patch_embed.weight"}


def to_released(state: dict[str, Tensor], patch_size: int, positions: Tensor) -> dict[str, Tensor]:
    """Our weights under the released names; ``positions`` (T, D) is the position table, which is stored there.

    Raises:
        InputError: for a key that has no released name.
    """
    state = {key: value for key, value in state.items() if key != "pos_embed"}
    released = rename(state, inverse(RELEASED), "a DiT, so the released format has no name for it")
    released["x_embedder.proj.weight"] = unflattened(released["x_embedder.proj.weight"], patch_size)
    return {"pos_embed": positions[None]} | released


def from_diffusers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of a DiTTransformer2DModel to ours; the patch embedding stays a convolution.

    Raises:
        InputError: for a key that no such model has, or where the embedders of two blocks differ: there is one here.
    """
    state = {key: value for key, value in state.items() if key != "pos_embed.pos_embed"}  # old versions stored it
    ours = rename(state, DIFFUSERS, "diffusers' DiTTransformer2DModel")
    for leaf in ("weight", "bias"):
        for key in [key for key in ours if key.endswith(f".attn.q.{leaf}")]:
            parts = [key.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
            if any(part not in ours for part in parts):
                raise InputError(f"diffusers' to_q, to_k and to_v belong together, but {key!r} stands alone")
            ours[key.replace(".attn.q.", ".attn.qkv.")] = torch.cat([ours.pop(part) for part in parts])
    for key in [key for key in ours if key.startswith("blocks.") and key.split(".", 2)[2] in EMBEDDERS]:
        name = key.split(".", 2)[2]
        value = ours.pop(key)
        if name in ours and not torch.equal(ours[name], value):
            their_key = next(iter(rename({key: value}, inverse(DIFFUSERS), "a DiT")))
            raise InputError(f"{their_key!r} differs from that of other blocks, but a DiT has one embedder for all")
        ours.setdefault(name, value)
    return ours


def to_diffusers(state: dict[str, Tensor], patch_size: int, depth: int) -> dict[str, Tensor]:
    """Our weights under diffusers' names, where every block has its own copy of the embedders.

    Raises:
        InputError: for a key that has no name there.
    """
    spread = {}
    for key, value in state.items():
        if key in EMBEDDERS:
            spread |= {f"blocks.{block}.{key}": value.clone() for block in range(depth)}
        elif ".attn.qkv." in key:
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                spread[key.replace(".attn.qkv.", f".attn.{part}.")] = rows.clone()
        else:
            spread[key] = unflattened(value, patch_size) if key == "patch_embed.weight" else value
    return rename(spread, inverse(DIFFUSERS), "a DiT, so diffusers has no name for it")


def unflattened(weight: Tensor, patch_size: int) -> Tensor:
    """The patch embedding (D, C*p*p) as the weight of a convolution, (D, C, p, p)."""
    return weight.unflatten(1, (-1, patch_size, patch_size))
