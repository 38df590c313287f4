"""Starting from other weights, where the number of classes or the resolution may be another."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditlit.checkpoints.contents import CheckpointContents, check_shapes, describe
from ditlit.diffusion import Process
from ditlit.errors import InputError, counted
from ditlit.models.embeddings import sincos_positions

OF_A_PROCESS = ("time_embed.", "final.linear.")  # keys of a DiT whose meaning a process gives


@torch.no_grad()
def initialize(
    denoiser: nn.Module,
    contents: CheckpointContents,
    class_names: list[str] | None,
    where: Any,
    process: Process | None = None,
) -> list[str]:
    """Give a denoiser the weights of a checkpoint.

    A fixed position table is that of the denoiser's own grid; a learned one is resized (bicubic). The row of the null
    class is always copied. Rows of classes are copied by name where the class names of both sides are known, and those
    of classes that the checkpoint does not know keep the denoiser's initialisation. Where names are unknown they are
    copied by number if there are as many, else not at all. Where the checkpoint's process is of another class, the
    denoiser's answer and its time mean something else: the last layer and the embedding of time begin anew.

    Args:
        denoiser: to be given weights, in place.
        contents: of the checkpoint.
        class_names: of the denoiser's classes, where known.
        where: the checkpoint's place, for messages.
        process: that the denoiser is trained with; the checkpoint's own where it is not given.

    Returns:
        What was done, a line for each thing.

    Raises:
        InputError: where anything else differs, with the first key that does not fit and both shapes.
    """
    ours, theirs = describe(denoiser), contents.denoiser
    if ours["class_path"] != theirs["class_path"]:
        raise InputError(f"{where} holds a {theirs['class_path']}, the denoiser is a {ours['class_path']}")
    designs = [config["init_args"].get("conditioning", "adaln_zero") for config in (ours, theirs)]
    if designs[0] != designs[1]:
        raise InputError(
            f"{where} has the conditioning {designs[1]}, the denoiser {designs[0]}, and their blocks have nothing to "
            f"give each other: set --model.denoiser.conditioning {designs[1]}"
        )
    own, state = denoiser.state_dict(), dict(contents.state)
    set_name = "weights" if contents.weights == "unknown" else f"{contents.weights} weights"
    report = [f"Starting from the {set_name} of {where} ({contents.format}, step {contents.step})"]
    report += fit_process(state, own, process, contents)
    report += fit_positions(state, own, denoiser.grid, contents)
    report += fit_labels(state, own, class_names, contents.latents.get("class_names"))
    check_shapes(state, own, where)
    heads = theirs["init_args"]["num_heads"], ours["init_args"]["num_heads"]
    if heads[0] != heads[1]:
        raise InputError(f"{where} has {heads[0]} attention heads, the denoiser has {heads[1]}")
    denoiser.load_state_dict(state)
    return report


def fit_process(
    state: dict[str, Tensor], own: dict[str, Tensor], process: Process | None, contents: CheckpointContents
) -> list[str]:
    """Leave what another process gives no meaning to as the denoiser has it."""
    if process is None or describe(process)["class_path"] == contents.process["class_path"]:
        return []
    anew = [key for key in own if key.startswith(OF_A_PROCESS)]
    state.update({key: own[key] for key in anew})
    theirs = contents.process["class_path"].rpartition(".")[2]
    return [
        f"Process: {theirs} to {type(process).__name__}; {', '.join(anew)} begin anew, blocks, patches and labels are "
        "kept"
    ]


def fit_positions(
    state: dict[str, Tensor], own: dict[str, Tensor], grid: tuple[int, int], contents: CheckpointContents
) -> list[str]:
    """Bring the position table in ``state`` to the grid of the denoiser."""
    height, width = contents.grid_size
    patch_size = contents.config["patch_size"]
    source = (height // patch_size, width // patch_size)
    sizes = f"{source[0]}x{source[1]} to {grid[0]}x{grid[1]}"
    if "pos_embed" not in own:
        return [] if source == grid else [f"Positions: {sizes}, computed"]
    if "pos_embed" not in state:
        state["pos_embed"] = sincos_positions(contents.config["hidden_size"], grid)
        return ["Positions: the learned table starts as the checkpoint's fixed one"]
    if source == grid:
        return []
    table = state["pos_embed"].float().unflatten(0, source).permute(2, 0, 1)  # (D, h, w)
    table = F.interpolate(table[None], grid, mode="bicubic", align_corners=False)[0]  # (D, h', w')
    state["pos_embed"] = table.permute(1, 2, 0).flatten(0, 1)  # (T, D)
    return [f"Positions: {sizes}, the learned table resized"]


def fit_labels(
    state: dict[str, Tensor], own: dict[str, Tensor], names: list[str] | None, known: list[str] | None
) -> list[str]:
    """Bring the label table in ``state`` to the classes of the denoiser."""
    key = "label_embed.weight"
    if key not in state or key not in own or state[key].shape[1] != own[key].shape[1]:
        return []  # for check_shapes to refuse
    theirs, table = state[key], own[key].clone()
    if theirs.shape == table.shape:
        if names and names == known:
            return []
        if not names or not known:
            silent = (
                "the store does not name" if known else "the checkpoint does not name" if names else "neither names"
            )
            return [f"Labels: {counted(len(table) - 1, 'class')}, copied by number, as {silent} them"]
    pairs = same_names(names, known)  # (our row, their row)
    for row, other in (*pairs, (-1, -1)):
        table[row] = theirs[other].to(table.dtype)
    state[key] = table
    classes = f"{len(theirs) - 1} to {counted(len(table) - 1, 'class')}"
    return [f"Labels: {classes}, {len(pairs)} copied by name, {len(table) - 1 - len(pairs)} new, and the null class"]


def same_names(names: list[str] | None, known: list[str] | None) -> list[tuple[int, int]]:
    """Rows (ours, theirs) of classes whose name occurs once on each side."""
    if not names or not known:
        return []
    return [(row, known.index(name)) for row, name in enumerate(names) if names.count(name) == 1 == known.count(name)]
