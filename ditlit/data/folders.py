"""The folder of a store: on a disk, or anywhere that fsspec reaches (s3://, gs://, hf://, http://)."""

import contextlib
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ditlit.errors import InputError

T = TypeVar("T")
WAITS = (0.5, 1.0, 2.0, 4.0)  # seconds before each new attempt
PERMANENT = (FileNotFoundError, PermissionError, NotImplementedError, IsADirectoryError)


class Folder(Protocol):
    """What a store needs of a folder. A file appears whole or not at all."""

    def names(self) -> set[str]:
        """Names of the files in it; none where the folder does not exist."""

    def read(self, name: str) -> bytes: ...

    def write(self, name: str, data: bytes) -> None: ...

    def location(self, name: str) -> str:
        """Path or URL of a file, for messages."""


def is_remote(location: str | Path) -> bool:
    return "://" in str(location)


def open_folder(location: str | Path) -> Folder:
    """The folder at a path or URL; it need not exist yet.

    Raises:
        InputError: for a URL whose protocol is unknown or needs a package that is not installed.
    """
    return RemoteFolder(str(location)) if is_remote(location) else LocalFolder(location)


class LocalFolder:
    def __init__(self, path: str | Path):
        self.path = Path(path)

    def names(self) -> set[str]:
        return {entry.name for entry in os.scandir(self.path)} if self.path.is_dir() else set()

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path / name, data)

    def location(self, name: str) -> str:
        return str(self.path / name)


class RemoteFolder:
    """A folder at a URL. Transient errors are tried again a few times, then reported with the URL.

    Safe to use after a fork: file systems keep a thread, so every process opens its own.
    """

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self._opened: tuple[int, Any, str] | None = None
        self._filesystem()

    def _filesystem(self) -> tuple[Any, str]:
        if self._opened is None or self._opened[0] != os.getpid():
            import fsspec  # only where a store is remote

            try:
                filesystem, path = fsspec.core.url_to_fs(self.url, skip_instance_cache=True)
            except (ImportError, ValueError) as error:
                raise InputError(f"cannot open {self.url}: {error}") from error
            self._opened = (os.getpid(), filesystem, path)
        return self._opened[1:]

    def names(self) -> set[str]:
        filesystem, path = self._filesystem()

        def entries() -> set[str]:
            filesystem.invalidate_cache()
            try:
                return {entry.rstrip("/").rsplit("/", 1)[-1] for entry in filesystem.ls(path, detail=False)}
            except FileNotFoundError:
                return set()

        return persistently(entries, self.url)

    def read(self, name: str) -> bytes:
        filesystem, path = self._filesystem()
        return persistently(lambda: filesystem.cat_file(f"{path}/{name}"), self.location(name))

    def write(self, name: str, data: bytes) -> None:
        filesystem, path = self._filesystem()
        # Object stores show an object only when all of it has arrived.
        persistently(lambda: filesystem.pipe_file(f"{path}/{name}", data), self.location(name))

    def download(self, name: str, to: Path, check: Callable[[Path], None]) -> None:
        """Copy a file to a local path.

        Args:
            name: of the file.
            to: where it appears once it is whole and right.
            check: called with the path of the copy before it appears; raises OSError for one to be fetched again.
        """
        filesystem, path = self._filesystem()
        temporary = to.with_name(f".{to.name}.{os.getpid()}.tmp")

        def fetch() -> None:
            filesystem.get_file(f"{path}/{name}", str(temporary))
            check(temporary)

        try:
            persistently(fetch, self.location(name))
            os.replace(temporary, to)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)

    def location(self, name: str) -> str:
        return f"{self.url}/{name}"


def persistently(call: Callable[[], T], url: str) -> T:
    """Call again after transient errors, waiting longer each time.

    Raises:
        InputError: naming the URL, at once for what will not pass (a missing object, no permission), else at the end.
    """
    for wait in (*WAITS, None):
        try:
            return call()
        except PERMANENT as error:
            raise InputError(f"cannot access {url}: {type(error).__name__}: {error}") from error
        except Exception as error:
            if wait is None:
                raise InputError(
                    f"cannot access {url} after {len(WAITS) + 1} attempts: {type(error).__name__}: {error}"
                ) from error
            time.sleep(wait)
    raise AssertionError


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files of writers that were killed; only while nothing else writes there."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def check_writable(folder: Path, setting: str) -> None:
    """Create a local folder that ``setting`` has named.

    Raises:
        InputError: where that fails, no file can be written there, or it is a URL.
    """
    if re.match("[a-z][a-z0-9+.-]+:/", str(folder)):  # a Path has but one slash left of a URL
        url = str(folder).replace(":/", "://", 1)
        raise InputError(f"results are written to a local folder, not to {url}: choose one with {setting}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as error:
        raise InputError(
            f"cannot write to {folder}: {error.strerror or error}; choose another place with {setting}"
        ) from None


def check_output(path: Path, setting: str) -> None:
    """Refuse a file that ``setting`` has named and that cannot be written; creates its folder.

    Raises:
        InputError: see :func:`check_writable`; also where there is a folder in its place.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder; give a file with {setting}")
    check_writable(path.parent, setting)


SHOWN = "The numbers are those shown above"  # what is left where they cannot be written


@contextlib.contextmanager
def writing(path: Path, otherwise: str = "") -> Iterator[None]:
    """Write results to ``path``: a failure is one line, followed by what it leaves the user.

    Raises:
        InputError: instead of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}. {otherwise}".rstrip()) from None


def write_atomically(path: Path, data: bytes) -> None:
    """Write to a temporary name, flush to disk, then rename, so that the file is whole or absent."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
