"""What lies where in a tar archive, so that its files can be read in any order without unpacking it."""

import posixpath
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from ditlit.errors import InputError

BLOCK = tarfile.BLOCKSIZE
NOWHERE = -2  # size of a link whose target is not there


class Member(NamedTuple):
    """A file in an archive: its bytes are the ``size`` ones from ``offset`` on."""

    name: str
    offset: int
    size: int


def read_index(path: Path) -> tuple[list[Member], list[str]]:
    """All files of an archive, and the names of earlier versions that later files of the same name replace.

    Hard and symbolic links to files of the archive have their target's bytes.

    Raises:
        InputError: for a file that is no tar archive, is compressed, damaged or cut, or holds sparse files.
    """
    places: dict[str, tuple[int, int]] = {}
    links: dict[str, str] = {}
    replaced = []
    for member in members(path):
        name = plain(member.name)
        if name in places or name in links:
            replaced.append(name)
            places.pop(name, None), links.pop(name, None)
        if member.issparse():
            raise InputError(f"{path} holds {name!r} as a sparse file; pack it again without --sparse")
        if member.isreg():
            places[name] = member.offset_data, member.size
        elif member.islnk():
            links[name] = plain(member.linkname)
        elif member.issym():
            links[name] = plain(posixpath.join(posixpath.dirname(name), member.linkname))
    for name in links:
        target, passed = links[name], {name}
        while target in links and target not in passed:
            passed.add(target)
            target = links[target]
        places[name] = places[target] if target in places and target not in links else (0, NOWHERE)
    return [Member(name, *place) for name, place in places.items()], replaced


def plain(name: str) -> str:
    """``./a/b`` and ``/a/b`` are ``a/b``."""
    return posixpath.normpath(name).lstrip("/")


def members(path: Path) -> Iterator[tarfile.TarInfo]:
    """All entries of one archive, or of several that were concatenated."""
    start: int | None = 0
    name = None
    try:
        with open(path, "rb") as file:
            end = file.seek(0, 2)
            while start is not None:
                file.seek(start)
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    while (member := tar.next()) is not None:
                        tar.members.clear()  # a million of them would fill the memory
                        name = member.name
                        if member.isreg() and member.offset_data + member.size > end:
                            raise tarfile.ReadError("unexpected end of data")
                        yield member
                    stop = tar.offset
                start = next_archive(path, file, stop)
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    except (tarfile.TarError, ValueError) as error:
        if name is None:
            raise InputError(
                f"{path} cannot be read as a tar archive ({error}); compressed archives must be unpacked first, since "
                "images are read in any order"
            ) from None
        raise InputError(
            f"{path} is cut or damaged in or after {name!r} ({error}; the file ends at byte {end:,}); copy or pack it "
            "again"
        ) from None


def next_archive(path: Path, file: BinaryIO, stop: int) -> int | None:
    """Where the next of several concatenated archives begins; None after the last.

    Args:
        path: of the archive, for messages.
        file: it.
        stop: where no further entry was found. Zero blocks must follow, which end an archive.
    """
    file.seek(stop)
    block = file.read(BLOCK)
    if len(block) < BLOCK:
        whole = "" if block else ", or, if nothing is missing, add them: truncate -s +1024 FILE"
        raise InputError(
            f"{path} is cut: it ends at byte {stop + len(block):,} without the blocks of zeros that end a tar archive; "
            f"copy or pack it again{whole}"
        )
    if block.strip(b"\0"):
        raise InputError(f"{path} is damaged: no entry of a tar archive begins at byte {stop:,}; copy or pack it again")
    while block:
        rest = block.lstrip(b"\0")
        if rest:
            return (file.tell() - len(rest)) // BLOCK * BLOCK
        block = file.read(1 << 20)
    return None
