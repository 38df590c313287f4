"""How far the moving average is from the weights that it follows."""

from collections import defaultdict

import torch
from torch import Tensor, nn

from ditlit.errors import InputError


def weight_distances(average: nn.Module, raw: nn.Module) -> dict[str, float]:
    """|average - raw| / |raw| of each layer's parameters together, by the layer's name.

    0 where both are zero, infinite where only the raw weights are.

    Raises:
        InputError: for two different models.
    """
    ours, theirs = ({name: p.detach() for name, p in model.named_parameters()} for model in (average, raw))
    if {n: p.shape for n, p in ours.items()} != {n: p.shape for n, p in theirs.items()}:
        raise InputError("the distance is that of two sets of weights of one model, and these are two models")
    layers: dict[str, list[str]] = defaultdict(list)
    for name in ours:
        layers[name.rpartition(".")[0] or name].append(name)
    return {
        layer: ratio(norm([ours[n] - theirs[n] for n in names]), norm([theirs[n] for n in names]))
        for layer, names in layers.items()
    }


def by_block(values: dict[str, float]) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Values by layer as (a list over the blocks for each kind of layer in a block, the values of all other layers)."""
    kinds: dict[str, list[float]] = defaultdict(list)
    others = {}
    for name, value in values.items():
        first, _, rest = name.partition(".")
        if first == "blocks":
            kinds[rest.partition(".")[2]].append(value)
        else:
            others[name] = value
    return dict(kinds), others


def norm(tensors: list[Tensor]) -> float:
    return float(torch.stack([tensor.double().square().sum() for tensor in tensors]).sum().sqrt())


def ratio(a: float, b: float) -> float:
    return a / b if b else (float("inf") if a else 0.0)
