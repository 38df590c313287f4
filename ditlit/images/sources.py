"""Where labelled images come from: a tree of class folders, a labels file, or tar archives."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ditlit.data.manifest import IMAGE_SUFFIXES
from ditlit.errors import InputError, counted
from ditlit.images.archives import NOWHERE
from ditlit.images.class_folders import by_folder, check_parts, leave_out_masks
from ditlit.images.files import File, Listing, add_folder, list_files, read_file
from ditlit.images.label_files import label_file, labelled
from ditlit.images.numbering import Numbering, number_classes
from ditlit.images.sidecars import one_of_each_sample, sidecar_labels

Label = int | str
NAMED = 3  # classes in the line that says what a source holds


class Entry(NamedTuple):
    """One image file: its name, its label where the source has one, and where its bytes lie."""

    name: str
    label: Label | None
    archive: int = -1  # number of the tar archive; -1 for a file of its own
    offset: int = 0
    size: int = -1  # all


class ImageSource:
    """Labelled images, sorted by name, to be read in any order from any process.

    Lists of a million Python objects would be copied into every worker process, so they are kept as arrays.

    Args:
        root: folder of the images, or of the archives.
        archives: paths of the tar archives.
        entries: the images.
        labels, num_classes, class_names, said: of the images and their classes, as in :class:`Numbering`.
        about: one line: which images and classes these are, and what was left out and why.
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
        about: str = "",
    ):
        self.root = root
        self.archives = archives
        self.labels = np.array(labels, np.int64)  # (n,)
        self.num_classes = num_classes
        self.class_names = class_names
        self.said = said
        self.about = about
        self._names = np.array([os.fsencode(entry.name) for entry in entries])
        self._places = np.array([entry[2:] for entry in entries], np.int64)  # (n, 3)

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, i: int) -> str:
        """Path of an image below the root, or ``archive.tar/member``."""
        return os.fsdecode(bytes(self._names[i]))

    def read(self, i: int) -> bytes:
        """The bytes of an image file."""
        return read_file(self.root, self.archives, self.name(i), *self._places[i].tolist())


def open_images(images: str | Path, labels: str | Path | None = None, within: str | None = None) -> ImageSource:
    """List the images of a folder or of tar archives, and their classes.

    The class of an image is, in this order: what the labels file says; a ``.cls`` or ``.cls.txt`` file, or ``label`` in
    a ``.json`` file, beside it (webdataset); the folder that holds it, directly below ``images`` or ``within``; the
    archive itself. :func:`number_classes` tells which number each gets.

    Args:
        images: folder of images, tar archive, or folder of tar archives.
        labels: file of image name and class: a table (CSV), or StyleGAN's ``dataset.json``; by default ``labels.csv``
            or ``dataset.json`` in the folder, where there is one.
        within: use only what lies in this folder of the tree or the archives.

    Raises:
        InputError: where there are no images, or their classes are not clear.
    """
    root = Path(images)
    if not root.exists():
        raise InputError(f"there are no images at {root}: it does not exist")
    listing = list_files(root, within)
    if listing.within and not listing.images and not listing.others:
        raise InputError(f"there is nothing in the folder {listing.within!r} of {root}, which --within names")
    if not listing.images:
        leave_out_others(listing, set())
        raise InputError(
            f"there are no images in {root / listing.within}: none ends in {', '.join(IMAGE_SUFFIXES)}; "
            f"{listing.left_out}"
        )
    file = label_file(listing, labels)
    if file is not None:
        chosen, used, origin = labelled(listing, *file), {file[0]}, f"as {file[0]} says"
    else:
        leave_out_masks(listing)
        sidecars, used = sidecar_labels(listing)
        if sidecars:
            check_parts(listing)
            chosen, origin = one_of_each_sample(listing, sidecars), "as the files beside them say"
        else:
            chosen, origin = by_folder(listing), "by folder"
    leave_out_others(listing, used)
    check_links(listing, [image for image, _ in chosen])
    entries = sorted(entry_of(*image) for image in chosen)
    numbering = number_classes([entry.label for entry in entries], file[0] if file else str(root))
    about = f"{counted(len(entries), 'image')} in {described(numbering)}, {origin}; {listing.left_out}"
    about = "".join(c if c.isprintable() else repr(c)[1:-1] for c in about)
    return ImageSource(root, listing.archives, entries, *numbering, about)


def described(numbering: Numbering) -> str:
    """``4 classes (ant, bee, cat, ...)``."""
    k, names = numbering.num_classes, numbering.names
    some = f"0 to {k - 1}" if names is None else ", ".join([*names[:NAMED], *["..."][: k > NAMED]])
    return f"{counted(k, 'class')} ({some})"


def entry_of(file: File, label: Label | None) -> Entry:
    return Entry(file.name, label, file.archive, file.offset, file.size)


def folder_entries(root: Path, prefix: str) -> Iterator[Entry]:
    """The images below a folder, whatever their classes."""
    listing = Listing(root, prefix)
    add_folder(listing)
    return (entry_of(file, None) for file in listing.images)


def leave_out_others(listing: Listing, used: set[str]) -> None:
    for file in listing.others:
        if listing.location(file) not in used:
            name = file.name.rsplit("/", 1)[-1]
            listing.left_out.add("files that are no images", os.path.splitext(name)[1] or name)


def check_links(listing: Listing, images: list[File]) -> None:
    """Refuse images that are links to nowhere."""
    lost = [image.name for image in images if image.size == NOWHERE]
    if lost:
        remedy = (
            "pack the archive with tar --dereference, so that it holds the images and not links to them"
            if listing.archives
            else "restore what they link to, or delete them"
        )
        raise InputError(
            f"{listing.root}: {len(lost):,} of {counted(len(images), 'image')} are links that lead nowhere, such as "
            f"{lost[0]!r}; {remedy}"
        )
