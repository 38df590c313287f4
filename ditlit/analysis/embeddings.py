"""Which classes a model takes to be alike."""

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ditlit.errors import InputError


@torch.no_grad()
def class_similarities(denoiser: nn.Module) -> Tensor:
    """Cosines between the embeddings of the K classes, (K, K), around their mean; the null class is left out.

    The mean is taken away because all embeddings share it: it would make all of them alike.
    """
    table = denoiser.label_embed.weight[: denoiser.num_classes].double()  # (K, D)
    table = normalize(table - table.mean(0), dim=1)
    return table @ table.T


def neighbours(similarities: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k classes most like each class, nearest first, without itself: numbers and cosines, each (K, k).

    Args:
        similarities: (K, K).
        k: fewer than K.

    Raises:
        InputError: where there are not that many other classes.
    """
    if not 1 <= k < len(similarities):
        raise InputError(f"a class has {len(similarities) - 1} neighbours at most, and 1 at least; got {k}")
    others = similarities.clone().fill_diagonal_(-torch.inf)
    found = others.topk(k, dim=1)
    return found.indices, found.values
