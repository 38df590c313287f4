"""Which classes a user means, and which label every sample gets."""

import difflib
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ditlit.diffusion.sampling import mix
from ditlit.errors import InputError


def parse_classes(text: str, num_classes: int, class_names: Sequence[str] | None) -> list[int]:
    """Class numbers from a comma-separated list of numbers and names.

    A name with commas of its own (ImageNet's "tench, Tinca tinca") is found by any of its parts.

    Raises:
        InputError: for a number out of range or an unknown name, with those most like it.
    """
    known: dict[str, int] = {}
    for number, name in enumerate(class_names or ()):
        for part in (name, *name.split(",")):
            known.setdefault(part.strip().lower(), number)
    classes = []
    for word in filter(None, (word.strip() for word in text.split(","))):
        if word.lower() in known:
            classes.append(known[word.lower()])
        elif word.isdigit():
            if int(word) >= num_classes:
                raise InputError(f"there is no class {word}: this model knows classes 0 to {num_classes - 1}")
            classes.append(int(word))
        else:
            near = difflib.get_close_matches(word.lower(), known, n=5, cutoff=0.5)
            raise InputError(
                f"there is no class {word!r}; "
                + (f"names like it are {', '.join(near)}" if near else "give its number")
                + ("" if known else ": the checkpoint knows no names of classes")
            )
    if not classes:
        raise InputError(f"no class is named in {text!r}")
    return classes


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
