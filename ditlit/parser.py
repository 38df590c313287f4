"""Parsers of our commands: help that can be read, and mistakes in one line."""

import argparse
import re
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from inspect import isclass
from itertools import groupby
from types import NoneType
from typing import Any, Literal, NamedTuple, get_args, get_origin

from jsonargparse import ArgumentParser, Namespace

from ditlit.errors import InputError
from ditlit.mistakes import class_of, unknown_setting

NAMES = 32  # columns for the names of settings
WIDEST = 120
HELP = ("--help", "-h")
TYPE = r"Expected a (?:<class '(\w+)'>|typing\.Literal\[(.*?)\])"  # in jsonargparse's messages


class Setting(NamedTuple):
    """What help says of a setting."""

    group: str
    name: str
    text: str
    notes: str  # its type and default


class Parser(ArgumentParser):
    """A parser whose help has one entry for each setting: its name, what it is, type and default.

    Attributes:
        classes: by the names of settings, the classes they are usually given, whose own settings are shown too.
    """

    classes: Mapping[str, type] = {}

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **({"exit_on_error": False, "allow_abbrev": False} | kwargs))

    def format_help(self, formatter: argparse.HelpFormatter | None = None) -> str:
        return self.help_on("all")

    def help_on(self, topic: str | None = None) -> str:
        """What ``--help`` shows, or ``--help all`` with all settings, or ``--help WORD`` with those so named.

        Raises:
            InputError: where no setting has that word in its name.
        """
        if topic is None:
            return page(self.brief(), self.description, self.epilog)
        if topic == "all":
            return page(list(self._settings()), self.description)
        settings = [setting for setting in self._settings() if topic in setting.name]
        if not settings:
            raise InputError(f"no setting has {topic!r} in its name")
        return page(settings)

    def brief(self) -> list[Setting]:
        """The settings that ``--help`` shows."""
        return list(self._settings())

    def _settings(self) -> Iterator[Setting]:
        for group in self._action_groups:
            actions = [action for action in group._group_actions if is_setting(self, action)]
            yield from (described(action, group.title) for action in actions)
            for action in actions:
                if (found := self._class_of(action)) is not None:
                    inner = ArgumentParser(exit_on_error=False)
                    inner.add_class_arguments(found, action.dest, fail_untyped=False)
                    title = f"--{action.dest}, of class {found.__name__}"
                    linked = {f"{action.dest}.{name}" for name in action.sub_add_kwargs.get("linked_targets", ())}
                    settings = [one for one in inner._actions if is_setting(inner, one) and one.dest not in linked]
                    yield from (described(one, title) for one in settings)

    def _class_of(self, action: argparse.Action) -> type | None:
        default = action.default.get("class_path", "") if hasattr(action.default, "get") else ""
        return class_of(default, None) if default.startswith("ditlit.") else self.classes.get(action.dest)


def page(settings: list[Setting], description: str | None = None, epilog: str | None = None) -> str:
    """Settings as help shows them, by their groups, with what is said before and after."""
    groups = groupby(settings, key=lambda setting: setting.group)
    sections = ["\n".join([f"{title}:", *map(entry, group)]) for title, group in groups]
    before = textwrap.fill(" ".join((description or "").split()), width())
    return "\n\n".join(filter(None, [before, *sections, (epilog or "").strip("\n")])) + "\n"


def is_setting(parser: ArgumentParser, action: argparse.Action) -> bool:
    """Whether an action is a setting of its own: no help, no link, and no name that several settings share."""
    if not any(option.startswith("--") for option in action.option_strings) or action.dest == argparse.SUPPRESS:
        return False
    if isinstance(action, argparse._HelpAction) or action.dest.endswith(".help"):
        return False
    inside = (a.dest for a in parser._actions if a.dest.startswith(f"{action.dest}."))
    return all(dest == f"{action.dest}.help" for dest in inside)


def described(action: argparse.Action, group: str) -> Setting:
    """What help says of the setting of an action."""
    notes = " | ".join(dict.fromkeys(type_names(getattr(action, "_typehint", None) or action.type)))
    if action.required:
        notes += ", required"
    elif action.default not in (None, argparse.SUPPRESS):
        notes += f", default: {default_text(action.default)}"
    text = re.sub(r"``|:\w+:", "", action.help or "")  # marks of reStructuredText
    return Setting(group, action.dest, " ".join(text.split()), notes.removeprefix(", "))


def entry(setting: Setting) -> str:
    """A setting as help shows it: its name, and beside it what it is."""
    text = f"{setting.text} ({setting.notes})" if setting.notes else setting.text
    lines = textwrap.wrap(text, width() - NAMES) or [""]
    name = f"  --{setting.name}"
    if len(name) >= NAMES:
        return "\n".join([name, *(f"{'':{NAMES}}{line}" for line in lines)])
    return f"{name:<{NAMES}}" + f"\n{'':{NAMES}}".join(lines)


def width() -> int:
    return min(shutil.get_terminal_size().columns, WIDEST)


def type_names(hint: Any) -> list[str]:
    """The types, or the choices, of which a value is one."""
    if hint in (None, NoneType):
        return []
    if get_origin(hint) is Literal:
        return list(map(str, get_args(hint)))
    if isclass(hint) and not get_args(hint):
        return [hint.__name__]
    parts = [name for part in get_args(hint) if not isinstance(part, list) for name in type_names(part)]
    if get_origin(hint) in (list, dict, tuple, set):
        return [f"{get_origin(hint).__name__} of {', '.join(dict.fromkeys(parts))}"]
    return parts  # of a union, or of what is made by a callable


def default_text(default: Any) -> str:
    """A default as users would write it, with a class as a call."""
    if isinstance(default, (Namespace, dict)) and "class_path" in default:
        args = dict(default.get("init_args") or {})
        return f"{default['class_path']}({', '.join(f'{name}={value}' for name, value in args.items())})"
    return str(default).lower() if isinstance(default, bool) else str(default)


def parsed(parser: Parser, words: Sequence[str], of: Parser | None = None) -> Namespace:
    """The settings in the words of a command line; where they ask for help, it is shown and the process ends.

    Args:
        of: the parser of the subcommand to whose settings the words belong, where ``parser`` has subcommands.

    Raises:
        InputError: for a mistake in them, in one line.
    """
    of = of or parser
    asked = next((i for i, word in enumerate(words) if word in HELP), None)
    if asked is not None:
        topic = words[asked + 1] if asked + 1 < len(words) and not words[asked + 1].startswith("-") else None
        print(of.help_on(topic))
        raise SystemExit
    try:
        return parser.parse_args(list(words))
    except (argparse.ArgumentError, UnicodeDecodeError) as error:
        raise InputError(unknown_setting(of, words) or one_line(str(error))) from error


def one_line(message: str) -> str:
    """What jsonargparse says of a mistake, in a line: the setting, what it takes, and what it was given."""
    text = " ".join(message.split())
    if (key := re.match(r'Parser key "([^"]+)": ', text)) is None:
        return text
    name, text = key[1], text[key.end() :]
    while inside := re.search(r"""Problem with given class_path '[^']*': Parser key "([^"]+)": (.*)""", text):
        name, text = f"{name}.{inside[1]}", inside[2].split(" - Expected a <class 'NoneType'>")[0]
    types = [word.strip("' ") for found in re.findall(TYPE, text) for word in "".join(found).split(",")]
    value = re.search(r"(?:Got|Given) value: (.*)$", text)
    if value is None or not types:
        return f"--{name}: {text}"
    return f"--{name} takes {' or '.join(dict.fromkeys(t for t in types if t != 'NoneType'))}, got {value[1]!r}"
