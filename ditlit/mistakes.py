"""Settings and classes that do not exist, each named with the nearest one that does."""

import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import Any, get_args

import yaml
from jsonargparse import ArgumentParser

from ditlit.settings.configs import CONFIG_OPTIONS, read_config

MOST = 3  # names that are offered


def unknown_setting(parser: ArgumentParser, words: Sequence[str]) -> str | None:
    """What to say of the first setting that ``parser`` does not have, on the command line or in a file given there.

    None where all of them exist. Files after ``--config`` and ``-c`` count, and the settings of classes that are chosen
    by their path.
    """
    chosen: dict[str, str] = {}
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    for i, word in enumerate(words):
        value = words[i + 1] if i + 1 < len(words) else ""
        if word in CONFIG_OPTIONS:
            file = "the configuration" if "\n" in value else value
            place, dashes, given = f" in {file}", "", read_config(value)
        elif word.startswith("--") and len(word) > 2:
            place, dashes, given = "", "--", {word[2:]: _value(value)}
        else:
            continue
        for kind, name, near in _unknown(parser, given, chosen):
            dashes = dashes if kind == "setting" else ""
            meant = f"; did you mean {' or '.join(dashes + n for n in near)}?" if near else ""
            return f"there is no {kind} {dashes}{name}{place}{meant}"
    return None


def _value(word: str) -> Any:
    try:
        return yaml.safe_load(word)
    except yaml.YAMLError:
        return word


def _names(parser: ArgumentParser) -> dict[str, Any]:
    """The settings of a parser, without the names that several share: dotted names to argparse's actions."""
    options = parser._option_string_actions
    names = {option[2:]: action for option, action in options.items() if option.startswith("--") and option[-1] != "+"}
    shared = {".".join(parts[:i]) for parts in (name.split(".") for name in names) for i in range(1, len(parts))}
    return {name: action for name, action in names.items() if name not in shared or takes_class(names, name)}


def takes_class(names: Mapping[str, Any], name: str) -> bool:
    """Whether a setting among all names is given a class, on whose settings there is help."""
    return all(other == f"{name}.help" for other in names if other.startswith(f"{name}."))


def _unknown(
    parser: ArgumentParser, given: Mapping[str, Any], chosen: dict[str, str], place: str = ""
) -> Iterator[tuple[str, str, list[str]]]:
    """Names of ``given`` that are no ``setting`` or no ``class``, with the nearest ones.

    Args:
        chosen: the class paths chosen so far, by the name of their setting; brought up to date.
        place: where in the whole the parser's names begin.
    """
    names = _names(parser)
    for key, value in given.items():
        yield from _look_up(parser, names, str(key).rstrip("+"), value, chosen, place)


def _look_up(parser, names, key, value, chosen, place) -> Iterator[tuple[str, str, list[str]]]:
    parts = key.split(".")
    for i in range(len(parts), 0, -1):
        name = ".".join(parts[:i])
        if name in names:
            for part in reversed(parts[i:]):
                value = {part: value}
            yield from _look_inside(names, name, value, chosen, place)
            return
    if any(name.startswith(f"{key}.") for name in names):
        for inner, entry in value.items() if isinstance(value, dict) else ():
            yield from _look_up(parser, names, f"{key}.{inner}", entry, chosen, place)
        return
    while isinstance(value, dict) and value:
        inner, value = next(iter(value.items()))
        key = f"{key}.{inner}"
    known = [name for name in names if not name.endswith(".help")]
    for name, action in names.items():
        if (inner := _inner_parser(names, name, action, None, chosen, place)) is not None:
            known += [f"{name}.{setting}" for setting in _names(inner) if not setting.endswith("help")]
    yield "setting", place + key, [place + name for name in nearest(key, known)]


def _look_inside(names, name, value, chosen, place) -> Iterator[tuple[str, str, list[str]]]:
    """The settings of the class, or classes of a list, that a setting is given."""
    if f"{name}.help" not in names:
        return
    for entry in value if isinstance(value, list) else [value]:
        path = entry.get("class_path") if isinstance(entry, dict) else entry
        if isinstance(path, str):
            chosen[place + name] = path
            if (near := _nearest_classes(path, names[name]._typehint)) is not None:
                yield "class", path, near
        if not isinstance(entry, dict):
            continue
        inner = _inner_parser(names, name, names[name], path, chosen, place)
        if inner is None:
            continue
        if "init_args" in entry:
            yield from _unknown(inner, entry["init_args"] or {}, chosen, f"{place}{name}.init_args.")
        else:
            settings = {k: v for k, v in entry.items() if k not in ("class_path", "dict_kwargs")}
            yield from _unknown(inner, settings, chosen, f"{place}{name}.")


def _inner_parser(names, name, action, path, chosen, place) -> ArgumentParser | None:
    """A parser of the class that a setting takes: that of ``path``, else the one chosen before, else the default's."""
    default = getattr(action, "default", None)
    path = path or chosen.get(place + name) or (default.get("class_path") if hasattr(default, "get") else None)
    if path is None or f"{name}.help" not in names:
        return None
    try:
        found = class_of(path, action._typehint)
        inner = ArgumentParser(exit_on_error=False)
        inner.add_class_arguments(found, fail_untyped=False)
    except Exception:  # what is wrong with a class is said by those who make it
        return None
    return inner


def class_of(path: str, hint: Any) -> type:
    """The class of a path, or of a bare name among the subclasses of those in a type.

    Raises:
        LookupError, ImportError, AttributeError: where there is none.
    """
    if "." in path:
        module, _, name = path.rpartition(".")
        return getattr(import_module(module), name)
    return next(c for base in _classes_in(hint) for c in _descendants(base) if c.__name__ == path)


def _nearest_classes(path: str, hint: Any) -> list[str] | None:
    """Classes that a path which names none may have meant; None where it names one, or may be something else."""
    if str in get_args(hint) or path.endswith((".yaml", ".yml", ".json")):
        return None
    try:
        class_of(path, hint)
    except (AttributeError, ModuleNotFoundError, StopIteration):
        module, _, name = path.rpartition(".")
        beside = [k for k, v in vars(sys.modules.get(module, object)).items() if inspect.isclass(v)]
        if near := get_close_matches(name, beside, 1):
            return [f"{module}.{near[0]}"]
        return get_close_matches(name, {c.__name__ for base in _classes_in(hint) for c in _descendants(base)}, 1)
    except Exception:
        return None
    return None


def _classes_in(hint: Any) -> list[type]:
    if inspect.isclass(hint) and not get_args(hint):
        return [hint] if hint.__module__ != "builtins" else []
    parts = get_args(hint)
    return [c for part in parts for c in (_classes_in(part) if not isinstance(part, list) else [])]


def _descendants(base: type) -> Iterator[type]:
    yield base
    for child in base.__subclasses__():
        yield from _descendants(child)


def nearest(name: str, known: Sequence[str]) -> list[str]:
    """Settings that a mistyped name may have meant: others beside it, the same word elsewhere, or alike as a whole."""
    parent, _, last = name.rpartition(".")
    beside = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == parent}
    found = [beside[k] for k in get_close_matches(last, beside, 1)]
    found = found or [k for word, k in beside.items() if word.startswith(last)]
    found = found or [k for k in known if k.rpartition(".")[2] == last]
    return (found or get_close_matches(name, known, 1))[:MOST]
