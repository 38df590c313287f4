"""Which classes a user means, by number or name: one rule for every setting that takes classes."""

import difflib
import functools
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from lightning.fabric.utilities.rank_zero import rank_zero_only

from ditlit.errors import InputError, counted
from ditlit.settings import Classes


class ClassSet(NamedTuple):
    """The classes of a store or a model: how many, their names where known, and whose they are, for messages."""

    number: int
    names: Sequence[str] | None
    where: str


def parse_classes(
    given: Classes, num_classes: int, class_names: Sequence[str] | None, where: str = "this model"
) -> list[int]:
    """Numbers of the classes that a list, or a text with commas, gives by number or name.

    What is the name of a class is that class, and any other number is a class's number: digits are names where classes
    are called by digits, however they are written. A name with commas of its own (ImageNet's "tench, Tinca tinca") is
    found by all of it or any of its parts. Case matters only between names that differ in nothing else.

    Args:
        given: the classes.
        num_classes: that there are.
        class_names: of them, where known.
        where: whose they are, for messages.

    Raises:
        InputError: for a number out of range or an unknown name, with those most like it.
    """
    names = [name.strip() for name in class_names or ()]
    known = spellings(names)
    words: Sequence[str | int] = given if isinstance(given, (list, tuple, range)) else [given]
    if isinstance(given, str):
        words = words_of(given, names)
    classes: list[int] = []
    told = False  # one example of the rule is enough
    for word in words:
        text = str(word).strip()
        numbers = known.get(text) or known.get(text.lower())
        is_number = re.fullmatch("-?[0-9]{1,18}", text)  # not isdigit: int() does not take all of those
        if numbers:
            told = told or tell_ambiguous(text, numbers, names, int(text) if is_number else None)
            classes.append(numbers[0])
        elif is_number:
            if not 0 <= int(text) < num_classes:
                raise InputError(f"there is no class {text}: {where} knows classes 0 to {num_classes - 1}")
            classes.append(int(text))
        else:
            near = difflib.get_close_matches(text.lower(), known, n=5, cutoff=0.5)
            raise InputError(
                f"there is no class {text!r}; "
                + (f"names like it are {', '.join(near)}" if near else "give its number")
                + ("" if known else f": {where} knows no names of classes")
            )
    if not classes:
        raise InputError(f"no class is named in {given!r}")
    return classes


def spellings(names: Sequence[str]) -> dict[str, list[int]]:
    """Numbers of the classes that a text may mean: as a whole name, before one in lower case, before a part of one."""
    whole = [(name, number) for number, name in enumerate(names)]
    parts = [(part.strip().lower(), number) for name, number in whole for part in name.split(",")]
    known: dict[str, list[int]] = {}
    for pairs in (parts, [(name.lower(), number) for name, number in whole], whole):
        found = defaultdict(list)
        for text, number in pairs:
            if number not in found[text]:
                found[text].append(number)
        known |= found
    known.pop("", None)
    return known


def words_of(text: str, names: Sequence[str]) -> list[str]:
    """The words between a text's commas; several of them are one where together they are a name."""
    pieces = text.split(",")
    whole = {name.lower() for name in names}
    most = 1 + max((name.count(",") for name in names), default=0)
    words, start = [], 0
    while start < len(pieces):
        for end in range(min(len(pieces), start + most), start, -1):
            word = ",".join(pieces[start:end]).strip()
            if end == start + 1 or word.lower() in whole:
                break
        words += [word] if word else []
        start = end
    return words


def tell_ambiguous(word: str, numbers: list[int], names: Sequence[str], number: int | None) -> bool:
    """Say how a word was read that could be read otherwise; returns whether it could."""
    if number is not None and 0 <= number < len(names) and number not in numbers:
        say_once(
            f"Class {word} is the one that is called {word} (number {numbers[0]}), not number {number} "
            f"({names[number]!r}): what is the name of a class is taken for the name."
        )
        return True
    elif len(numbers) > 1:
        say_once(
            f"{word!r} could be any of the classes {', '.join(map(str, numbers))}; number {numbers[0]} is taken. Give "
            "the number of another one."
        )
        return True
    return False


def match_classes(theirs: ClassSet, ours: ClassSet, setting: str, given: Classes | None = None) -> list[int]:
    """Our number of each of their classes; -1 for those that we do not have.

    Classes are the same by what the user gives, else by their names, else by number, where there are equally many.

    Args:
        theirs: of a store that is to be read with our labels.
        ours: those that labels mean.
        setting: with which the user says which is which.
        given: what it was set to: the class of ours that each of theirs is.

    Raises:
        InputError: where it cannot be told which class is which, or none is ours.
    """
    remedy = f"set {setting} to the class of {ours.where} that each of them is, as numbers or names in their order"
    if given is not None:
        numbers = parse_classes(given, ours.number, ours.names, ours.where)
        if len(numbers) != theirs.number or len(set(numbers)) < len(numbers):
            raise InputError(
                f"{setting} needs one class, and none twice, for each of the {theirs.number} of {theirs.where}; got "
                f"{numbers}"
            )
        return numbers
    if theirs.names and ours.names and list(theirs.names) != list(ours.names):
        number = {name: k for k, name in enumerate(ours.names)}
        if len(number) < ours.number or len(set(theirs.names)) < theirs.number:
            raise InputError(f"two classes of {theirs.where} or {ours.where} have one name; {remedy}")
        numbers = [number.get(name, -1) for name in theirs.names]
        foreign = [name for name in theirs.names if name not in number]
        if len(foreign) == theirs.number:
            raise InputError(
                f"no class of {theirs.where} ({', '.join(foreign[:3])}, ...) has the name of one of {ours.where} "
                f"({', '.join(ours.names[:3])}, ...); {remedy}"
            )
        if foreign:
            shown = ", ".join(foreign[:5]) + (", ..." if len(foreign) > 5 else "")
            say_once(f"{theirs.where}: leaving out {counted(len(foreign), 'class')} that {ours.where} lacks: {shown}")
        return numbers
    if theirs.number != ours.number:
        raise InputError(
            f"{theirs.where} has {counted(theirs.number, 'class')}, {ours.where} has {ours.number}, and "
            f"their names do not tell which they are; {remedy}"
        )
    return list(range(ours.number))


@functools.cache
def say_once(text: str) -> None:
    if rank_zero_only.rank == 0:
        print(text)
