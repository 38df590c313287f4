"""The files of a folder or of tar archives as one list, and what is left out of it."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ditlit.data.manifest import IMAGE_SUFFIXES
from ditlit.errors import InputError
from ditlit.images.archives import NOWHERE, read_index
from ditlit.images.decoding import MAGIC_BYTES, is_image_data

SYSTEM = {
    "__macosx", "@eadir", "@recycle", "#recycle", "$recycle.bin", "system volume information", "lost+found",
    "thumbs.db", "ehthumbs.db", "desktop.ini",
}  # fmt: skip
ARCHIVE = ".tar"
EXAMPLES = 3  # of each reason


class File(NamedTuple):
    """A file that may be an image.

    Attributes:
        base: what is not looked at for classes: ``within`` of a tree, or ``archive.tar/within`` of an archive.
        path: of the file below that.
        archive: number of the tar archive; -1 for a file of its own.
        offset, size: where its bytes lie in the archive; all of a file of its own.
    """

    base: str
    path: str
    archive: int = -1
    offset: int = 0
    size: int = -1

    @property
    def name(self) -> str:
        return self.base + self.path

    @property
    def stem(self) -> str:
        """The name without its last suffix."""
        return os.path.splitext(self.name)[0]


@dataclass
class LeftOut:
    """Files and folders that are not used: how many for each reason, with some examples."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, example: str) -> None:
        self.counts[reason] += 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < EXAMPLES and example not in examples:
            examples.append(example)

    def __str__(self) -> str:
        reasons = [f"{reason}: {n:,} ({', '.join(self.examples[reason])})" for reason, n in self.counts.items()]
        return f"left out: {'; '.join(reasons)}" if reasons else "nothing is left out"


@dataclass
class Listing:
    """What lies in a folder or in archives, in the order of names.

    Attributes:
        root: the folder, or the archive.
        within: the part of it that is listed; empty, or ends in a slash.
        archives: the tar archives, where they hold the images.
        images: by their suffix, or of files without one by their first bytes.
        others: files that are none.
        left_out: hidden files and folders, links that lead in circles, older versions in archives.
    """

    root: Path
    within: str
    archives: list[Path] = field(default_factory=list)
    images: list[File] = field(default_factory=list)
    others: list[File] = field(default_factory=list)
    left_out: LeftOut = field(default_factory=LeftOut)

    def add(self, files: Iterable[File]) -> None:
        for file in files:
            (self.images if self.is_image(file) else self.others).append(file)

    def is_image(self, file: File) -> bool:
        suffix = os.path.splitext(file.path)[1].lower()
        if suffix and not suffix[1:].isdigit():
            return suffix in IMAGE_SUFFIXES
        return file.size != NOWHERE and is_image_data(self.read(file, MAGIC_BYTES))

    def read(self, file: File, most: int | None = None) -> bytes:
        """The bytes of a file, or no more than its first ones."""
        try:
            return read_file(self.root, self.archives, file.name, file.archive, file.offset, file.size, most)
        except OSError as error:
            raise InputError(f"cannot read {self.location(file)}: {error.strerror or error}") from None

    def location(self, file: File) -> str:
        """Its path, for messages."""
        return str((self.root.parent if self.archives == [self.root] else self.root) / file.name)


def read_file(
    root: Path, archives: list[Path], name: str, archive: int, offset: int, size: int, most: int | None = None
) -> bytes:
    # Opened anew every time: an offset is nothing to share between workers, and archives may be more than a process
    # may hold open.
    with open(root / name if archive < 0 else archives[archive], "rb") as file:
        file.seek(offset)
        return file.read(size if most is None else most)


def list_files(root: Path, within: str | None = None) -> Listing:
    """List a folder, a tar archive, or a folder of tar archives.

    Args:
        root: of them.
        within: list only what lies in this folder of the tree or of the archives.

    Raises:
        InputError: where something cannot be listed, or archives lie beside images.
    """
    listing = Listing(root, f"{os.path.normpath(within).strip('/')}/" if within and within != "." else "")
    if root.is_file():
        add_archives(listing, [root])
    else:
        add_folder(listing)
        archives = sorted(root / name for name in os.listdir(root) if is_archive(name) and (root / name).is_file())
        if archives and not listing.images:
            listing.others = [file for file in listing.others if root / file.name not in archives]
            add_archives(listing, archives)
        elif archives and not listing.within:
            raise InputError(
                f"{root} holds archives ({archives[0].name}) and images outside of them ({listing.images[0].name}): "
                "give one archive with --images FILE, or one folder with --within FOLDER, or move one kind elsewhere"
            )
    listing.images.sort(key=lambda file: file.name)
    listing.others.sort(key=lambda file: file.name)
    return listing


def add_folder(listing: Listing) -> None:
    folder = listing.root / listing.within
    if folder.is_dir():
        listing.add(walk(folder, listing.within, "", frozenset(), listing.left_out))


def walk(folder: Path, base: str, path: str, above: frozenset, left_out: LeftOut) -> Iterator[File]:
    """The files below a folder, links followed."""
    try:
        stat = folder.stat()
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(f"cannot list {folder}: {error.strerror or error}") from None
    itself = (stat.st_dev, stat.st_ino)
    if itself in above:
        left_out.add("links to a folder that they lie in", path.rstrip("/"))
        return
    for entry in entries:
        name = path + entry.name
        is_link = entry.is_symlink()
        if is_hidden(entry.name):
            left_out.add("hidden files and folders", entry.name)
        elif os.path.isdir(entry) if is_link else entry.is_dir():
            yield from walk(folder / entry.name, base, f"{name}/", above | {itself}, left_out)
        elif os.path.isfile(entry) if is_link else entry.is_file():
            yield File(base, name)
        else:  # no target, or a socket or pipe
            yield File(base, name, size=NOWHERE)


def add_archives(listing: Listing, archives: list[Path]) -> None:
    listing.archives = archives
    for number, path in enumerate(archives):
        files, replaced = read_index(path)
        for name in replaced:
            listing.left_out.add("older versions of a file in its archive", name)
        base = f"{path.name}/{listing.within}"
        inside = [file for file in files if file.name.startswith(listing.within)]
        inside.sort()
        for file in inside:
            hidden = next((part for part in file.name[len(listing.within) :].split("/") if is_hidden(part)), None)
            if hidden is not None:
                listing.left_out.add("hidden files and folders", hidden)
            else:
                listing.add([File(base, file.name[len(listing.within) :], number, file.offset, file.size)])


def is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in SYSTEM


def is_archive(name: str) -> bool:
    return name.lower().endswith(ARCHIVE) and not is_hidden(name)
