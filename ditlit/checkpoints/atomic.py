"""Outputs that are whole or absent."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ditlit.errors import InputError


@contextmanager
def replacing(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A path beside ``path`` to write a file or folder at, which takes its place when the block ends without an error.

    Raises:
        InputError: where there is something at ``path`` and it may not be overwritten.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists already; choose another place or set overwrite to true")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        for file in [temporary, *temporary.rglob("*")]:
            if file.is_file():
                file.chmod(0o666 & ~umask)  # safetensors writes files that only their owner can read
                with open(file, "rb") as opened:
                    os.fsync(opened.fileno())
        swap_in(temporary, path)
    finally:
        remove(temporary)


def swap_in(temporary: Path, path: Path) -> None:
    if not path.is_dir() and not temporary.is_dir():
        os.replace(temporary, path)
        return
    old = temporary.with_suffix(".old")  # no folder can take the place of another in one step
    if path.exists():
        os.replace(path, old)
    try:
        os.replace(temporary, path)
    except OSError:
        if old.exists():
            os.replace(old, path)
        raise
    remove(old)


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
