"""Where labelled images come from: a tree of class folders, a labels file, or tar archives."""

import csv
import json
import os
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from ditlit.data.images import SUFFIXES
from ditlit.data.numbering import number_classes, number_or_name
from ditlit.errors import InputError

Label = int | str


class Entry(NamedTuple):
    """One image file: its name, its label where the source has one, and where its bytes lie."""

    name: str
    label: Label | None
    archive: int = -1  # number of the tar archive; -1 for a file of its own
    offset: int = 0
    size: int = 0


class ImageSource:
    """Labelled images, sorted by name, to be read in any order from any process.

    Lists of a million Python objects would be copied into every worker process, so they are kept as arrays.

    Args:
        root: folder of the images, or of the archives.
        archives: paths of the tar archives.
        entries: the images.
        labels, num_classes, class_names, said: of the images and their classes, as in :class:`Numbering`.
    """

    def __init__(
        self,
        root: Path,
        archives: list[Path],
        entries: list[Entry],
        labels: list[int],
        num_classes: int,
        class_names: list[str] | None,
        said: str = "",
    ):
        self.root = root
        self.archives = archives
        self.labels = np.array(labels, np.int64)  # (n,)
        self.num_classes = num_classes
        self.class_names = class_names
        self.said = said
        self._names = np.array([os.fsencode(entry.name) for entry in entries])
        self._places = np.array([entry[2:] for entry in entries], np.int64)  # (n, 3)

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, i: int) -> str:
        """Path of an image below the root, or ``archive.tar/member``."""
        return os.fsdecode(bytes(self._names[i]))

    def read(self, i: int) -> bytes:
        """The bytes of an image file."""
        archive, offset, size = self._places[i].tolist()
        if archive < 0:
            return (self.root / self.name(i)).read_bytes()
        with open(self.archives[archive], "rb") as file:  # anew: a process may not hold a thousand archives open
            file.seek(offset)
            return file.read(size)


def open_images(images: str | Path, labels: str | Path | None = None, within: str | None = None) -> ImageSource:
    """List the images of a folder or of tar archives, and their classes.

    The class of an image is, in this order: what the labels file says; in archives a ``.cls`` file, or ``label`` in a
    ``.json`` file, beside it (webdataset); the folder that holds it, directly below ``images`` or ``within``; the
    archive itself. :func:`number_classes` tells which number each gets.

    Args:
        images: folder of images, tar archive, or folder of tar archives.
        labels: CSV file of image name and class; by default ``labels.csv`` in the folder, where there is one.
        within: use only what lies in this folder of the tree or the archives.

    Raises:
        InputError: where there are no images, or their classes are not clear.
    """
    root = Path(images)
    if not root.exists():
        raise InputError(f"there are no images at {root}: it does not exist")
    prefix = f"{within.strip('/')}/" if within else ""
    archives = [root] if root.is_file() else sorted(p for p in root.iterdir() if p.suffix == ".tar")
    if archives:
        entries = [entry for i, path in enumerate(archives) for entry in archive_entries(path, i, prefix)]
    else:
        entries = list(folder_entries(root, prefix))
    if not entries:
        raise InputError(f"there are no images in {root / prefix}: none ends in {', '.join(SUFFIXES)}")
    entries.sort()
    default = root / "labels.csv"
    if labels is None and root.is_dir() and default.is_file():
        labels = default
    if labels is not None:
        entries = labelled(entries, Path(labels))
    without = next((entry.name for entry in entries if entry.label is None), None)
    if without is not None:
        raise InputError(
            f"{root}: the class of {without!r} is not clear; put the images of each class in a folder of their own, or "
            "give a CSV file of image name and class with --labels"
        )
    return ImageSource(root, archives, entries, *number_classes([e.label for e in entries], str(labels or root)))


def folder_entries(root: Path, prefix: str) -> Iterator[Entry]:
    for folder, folders, files in os.walk(root / prefix, followlinks=True):
        folders.sort()
        relative = Path(folder).relative_to(root)
        parts = Path(folder).relative_to(root / prefix).parts
        for file in files:
            if file.lower().endswith(SUFFIXES) and not file.startswith("."):
                yield Entry((relative / file).as_posix(), parts[0] if parts else None)


def archive_entries(path: Path, number: int, prefix: str) -> list[Entry]:
    """The images of one tar archive."""
    found: list[tuple[PurePosixPath, int, int]] = []
    sidecars: dict[str, Label] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile() or not member.name.removeprefix("./").startswith(prefix):
                    continue
                name = PurePosixPath(member.name)
                if name.suffix.lower() in SUFFIXES and not name.name.startswith("."):
                    found.append((name, member.offset_data, member.size))
                elif name.suffix in (".cls", ".json"):
                    label = sidecar_label(name, tar.extractfile(member).read())
                    if label is not None:
                        sidecars[key_of(name)] = label
    except tarfile.ReadError as error:
        raise InputError(
            f"{path} cannot be read as a tar archive ({error}); compressed archives must be unpacked first, since "
            "images are read in any order"
        ) from None
    entries = []
    parents: dict[str, str] = {}
    for name, offset, size in found:
        folders = PurePosixPath(str(name).removeprefix("./").removeprefix(prefix)).parts[:-1]
        label = sidecars.get(key_of(name))
        if label is None and folders:
            label = folders[0] if prefix else folders[-1]
            parent = str(name.parent.parent)
            if not prefix and parents.setdefault(label, parent) != parent:
                raise InputError(
                    f"{path} holds the class {label!r} in {parents[label]!r} and in {parent!r}; choose one with "
                    "--within"
                )
        elif label is None and sidecars:
            raise InputError(f"{path}: some images have a .cls or .json file beside them, but {str(name)!r} has none")
        elif label is None:
            label = path.stem
        entries.append(Entry(f"{path.name}/{name}", label, number, offset, size))
    return entries


def key_of(name: PurePosixPath) -> str:
    """What the files of one webdataset sample have in common: the path up to the first dot of the file's name."""
    return str(name.parent / name.name.split(".", 1)[0])


def sidecar_label(name: PurePosixPath, data: bytes) -> Label | None:
    if name.suffix == ".json":
        try:
            label = json.loads(data)
        except ValueError:
            return None
        label = label.get("label") if isinstance(label, dict) else None
        return label if isinstance(label, (int, str)) else None
    return number_or_name(data.decode(errors="replace"))


def labelled(entries: Iterable[Entry], path: Path) -> list[Entry]:
    """The entries that a labels file names, with its labels.

    The file has two columns, image name and class, and may have a header. Images that it does not name are left out.

    Raises:
        InputError: where the file cannot be read or names an image that is not there.
    """
    try:
        with open(path, newline="") as file:
            rows = [row for row in csv.reader(file) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"cannot read the labels file {path}: {error}") from None
    by_name = {entry.name: entry for entry in entries}
    chosen: dict[str, Entry] = {}
    for line, row in enumerate(rows):
        if len(row) != 2:
            raise InputError(f"{path} line {line + 1}: need two columns, image name and class, got {row}")
        name = row[0].strip()
        if name not in by_name and line == 0:
            continue  # a header
        if name not in by_name:
            raise InputError(f"{path} line {line + 1}: there is no image {name!r}")
        if name in chosen:
            raise InputError(f"{path} line {line + 1}: {name!r} has a class already")
        chosen[name] = by_name[name]._replace(label=number_or_name(row[1]))
    if not chosen:
        raise InputError(f"{path} names none of the images")
    return [chosen[name] for name in sorted(chosen)]
