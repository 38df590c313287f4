"""Configuration files: yours and the shipped ones."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ditlit.errors import InputError
from ditlit.settings import renamed

# In a checkout the configurations lie beside the package, in a wheel inside it.
CONFIG_FOLDERS = (Path(__file__).parents[1] / "configs", Path(__file__).parents[2] / "configs")
CONFIG_OPTIONS = ("--config", "-c")


def find_config(name: str) -> str:
    """A configuration file as given, or else the shipped one of that name.

    Raises:
        InputError: where there is neither; lists the shipped ones.
    """
    if Path(name).exists():
        return name
    for folder in CONFIG_FOLDERS:
        if (folder / name).is_file():
            return str(folder / name)
    raise InputError(f"there is no configuration {name!r}, neither here nor shipped; shipped: {shipped_configs()}")


def shipped_configs(pattern: str = "**/*.yaml") -> str:
    return ", ".join(sorted({str(p.relative_to(f)) for f in CONFIG_FOLDERS for p in f.glob(pattern)}))


def read_config(file: str) -> dict[str, Any]:
    """What a YAML file holds, or a text that takes its place; nothing where it cannot be read, of which others tell.

    Raises:
        InputError: for a file that holds no settings.
    """
    try:
        content = yaml.safe_load(file if "\n" in file else Path(file).read_bytes())
    except OSError:
        return {}
    except yaml.YAMLError as error:
        raise InputError(f"{file} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} holds no settings" + ("" if content is None else f", but {content!r:.60}"))
    return content


def with_found_configs(words: Sequence[str]) -> list[str]:
    """The words of a command line with the files after ``--config`` and ``-c`` found, and names that are out of date
    replaced: in a file that has such names, by its new content in the place of its path.

    Raises:
        InputError: for files that are not there, or hold no settings.
    """
    new, before = [], ""
    for word in words:
        name, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        if (name if equals else before) in CONFIG_OPTIONS:
            value = find_config(value)
            old = read_config(value)
            current = renamed.in_settings(old)
            value = value if current == old else yaml.safe_dump(current, sort_keys=False)
        else:
            value = renamed.in_settings(value)
        new.append((f"--{renamed.setting(name[2:])}" if name else "") + equals + value)
        before = word
    return new
