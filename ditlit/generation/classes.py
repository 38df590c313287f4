"""Which label every sample gets."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ditlit.diffusion.noise import mix


def plan_labels(
    classes: Sequence[int], num_samples: int | None, per_class: int, labels: Literal["balanced", "random"], seed: int
) -> Tensor:
    """The label of every sample (n,).

    Without ``num_samples``, ``per_class`` samples of each class, class by class. With it, that many samples: balanced
    takes the classes in turn, random draws a class for each, from the seed and the sample's number alone.
    """
    if num_samples is None:
        return torch.tensor(classes).repeat_interleave(per_class)
    if labels == "balanced":
        picked = torch.arange(num_samples) % len(classes)
    else:
        picked = torch.tensor([mix(seed, i, LABEL_STREAM) % len(classes) for i in range(num_samples)])
    return torch.tensor(classes)[picked]


LABEL_STREAM = 1  # keeps the draws of labels apart from those of noise
