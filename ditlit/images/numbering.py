"""Which number each class of images gets: that of its place among the names, or the one that it was given."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from ditlit.errors import InputError

MOST_CLASSES = 2**16  # three times those of ImageNet-21k
SHOWN = 5  # numbers in a message


class Numbering(NamedTuple):
    """The classes of labelled images.

    Attributes:
        labels: number of each image's class.
        num_classes: numbers run from 0 to this less one.
        names: of the classes; None where numbers are all there is.
        said: what the user should know of it; empty where nothing.
    """

    labels: list[int]
    num_classes: int
    names: list[str] | None
    said: str = ""


def number_or_name(text: str) -> int | str:
    """What a label in a file is. Numbers are written as one counts: ``007``, ``1.0`` and ``²`` are names."""
    text = text.strip()
    return int(text) if re.fullmatch("-?(0|[1-9][0-9]{0,17})", text) else text


def number_classes(labels: Sequence[int | str], where: str) -> Numbering:
    """Number the classes of labelled images.

    Names are numbered in their order. Numbers mean themselves, and a class without images stays empty; but where they
    are 1 to K they are counted from 0, and the old ones kept as names. Where some label is a number with leading zeros,
    as ``007``, all of them are names.

    Args:
        labels: of the images, each a number or a name.
        where: they come from, for messages.

    Raises:
        InputError: for negative numbers, numbers beside names, and numbers too large to count classes.
    """
    found = set(labels)
    named = {label for label in found if isinstance(label, str)}
    if named and all(label.isascii() and label.isdigit() for label in named) and named != found:
        labels = [str(label) for label in labels]
        found = named = set(labels)
    if named:
        if named != found:
            some = [next(label for label in labels if isinstance(label, kind)) for kind in (int, str)]
            raise InputError(
                f"{where}: some classes are numbers and others names (such as {some[0]!r} and {some[1]!r}); use one or "
                "the other"
            )
        names = sorted(found)
        number = {name: i for i, name in enumerate(names)}
        text = [name.encode(errors="backslashreplace").decode() for name in names]  # folders may be named by any bytes
        return Numbering([number[label] for label in labels], len(names), text)
    low, high = min(found), max(found)
    if low < 0:
        raise InputError(f"{where}: classes are numbered from 0, got {low}")
    if high >= MOST_CLASSES:
        raise InputError(
            f"{where}: class {high} would make a store of {high + 1:,} classes, since numbers mean themselves, from 0 "
            f"on; number the {len(found):,} classes from 0, or make names of what are none, as in id{high}"
        )
    if low == 1 and high == len(found):
        said = f"classes are numbered from 1 to {high}: the store counts from 0, and keeps these numbers as names"
        return Numbering([label - 1 for label in labels], high, [str(k) for k in range(1, high + 1)], said)
    said = ""
    if empty := high + 1 - len(found):
        first = [str(k) for k in range(high + 1) if k not in found][:SHOWN]
        shown = ", ".join(first) + (", ..." if empty > len(first) else "")
        said = f"{empty:,} of the classes 0 to {high} without images, which stay empty: {shown}"
    return Numbering(list(labels), high + 1, None, said)
