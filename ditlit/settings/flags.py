"""Between dataclasses of settings and the flat names that they have on a command line, in files and in calls."""

from collections.abc import Mapping
from dataclasses import MISSING, Field, asdict, fields, is_dataclass, replace
from typing import Any, TypeVar, get_type_hints

from jsonargparse import ArgumentParser

T = TypeVar("T")


def make(kind: type[T], settings: Mapping[str, Any]) -> T:
    """A dataclass of settings from flat ones: those of its groups go there, and keep the group's defaults.

    Raises:
        InputError: for values that it refuses.
        TypeError: for a setting that it does not have, or that is missing.
    """
    groups = groups_of(kind)
    given = dict(settings)
    for field, group in groups.items():
        changes = {each.name: given.pop(each.name) for each in fields(group) if each.name in given}
        given[field.name] = replace(field.default, **changes)
    return kind(**given)


def flat(settings: Any) -> dict[str, Any]:
    """The inverse of :func:`make`."""
    names = {field.name for field in groups_of(type(settings))}
    values = {field.name: getattr(settings, field.name) for field in fields(settings)}
    own = {name: value for name, value in values.items() if name not in names}
    return own | {key: value for name in names for key, value in asdict(values[name]).items()}


def as_words(settings: Any) -> list[str]:
    """The words of a command line that say the same."""
    kind = type(settings)
    default = {key: value for field in groups_of(kind) for key, value in asdict(field.default).items()}
    default |= {field.name: field.default for field in fields(kind) if field.default is not MISSING}
    changed = {name: value for name, value in flat(settings).items() if value != default.get(name)}
    return [word for name, value in changed.items() for word in (f"--{name}", text_of(value))]


def text_of(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def add_arguments(parser: ArgumentParser, kind: type) -> None:
    """Give a parser the settings of a dataclass, flat."""
    groups = groups_of(kind)
    parser.add_class_arguments(kind, as_group=False, skip={field.name for field in groups})
    for field, group in groups.items():
        parser.add_class_arguments(group)
        parser.set_defaults(asdict(field.default))


def groups_of(kind: type) -> dict[Field, type]:
    """The fields that are groups of settings, with their dataclasses."""
    hints = get_type_hints(kind)
    return {field: hints[field.name] for field in fields(kind) if is_dataclass(hints[field.name])}
