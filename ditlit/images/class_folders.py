"""Classes by the folders that hold the images, and what looks like a class or an image of it but is none."""

import os
import posixpath
import re
from itertools import takewhile

from ditlit.errors import InputError
from ditlit.images.files import File, Listing, is_hidden

SPLIT = re.compile(
    r"(train|training|val|valid|validation|test|testing|eval|dev)([ _-]?(set|data|images|imgs|split|\d+))*"
)
ROLE = re.compile(
    r"images?|imgs?|jpegimages|masks?|annotations?|labels?|segmentation(s|class|object)?|ground_?truth|gt"
)
MASK = re.compile(r"[ ._-](masks?|segm?|segmentation|labels?|labelids|depth|alpha|matte|trimap|gt)([ ._-]?\d+)?", re.I)


def leave_out_masks(listing: Listing) -> None:
    """Leave out ``x_mask.png`` or ``x.seg.png`` beside ``x.jpg``."""
    stems = {image.stem for image in listing.images}
    kept = []
    for image in listing.images:
        *_, match = [None, *MASK.finditer(image.stem)]
        if match and match.end() == len(image.stem) and image.stem[: match.start()] in stems:
            listing.left_out.add("masks beside their images", image.name)
        else:
            kept.append(image)
    listing.images = kept


def by_folder(listing: Listing) -> list[tuple[File, str]]:
    """Images and their classes: in a tree, and in archives with ``within``, the outermost folder; in archives the
    folder that holds the image, or the archive where it has no folders.

    Raises:
        InputError: where images lie outside of folders, or the folders are not classes.
    """
    check_archives(listing)
    check_parts(listing)
    labelled = []
    for image in listing.images:
        *folders, _ = image.path.split("/")
        if not folders and image.archive < 0:
            raise InputError(
                f"{listing.root}: the class of {image.name!r} is not clear; put the images of each class in a folder "
                "of their own, or give a CSV file of image name and class with --labels"
            )
        if not folders:
            labelled.append((image, listing.archives[image.archive].stem))
        else:
            labelled.append((image, folders[-1] if listing.archives and not listing.within else folders[0]))
    if not listing.archives:
        classes = {label for _, label in labelled}
        for name in sorted(os.listdir(listing.root / listing.within)):
            if name not in classes and not is_hidden(name) and (listing.root / listing.within / name).is_dir():
                listing.left_out.add("folders without images", name)
    return labelled


def check_archives(listing: Listing) -> None:
    """Refuse archives in which more than one folder, or folders of more than one depth, may be a class."""
    if not listing.archives or listing.within:
        return
    seen: dict[tuple[int, str], str] = {}
    first: dict[int, str] = {}
    for number, folder in sorted({(image.archive, posixpath.dirname(image.path)) for image in listing.images}):
        parent, _, label = folder.rpartition("/")
        other = seen.setdefault((number, label), parent)
        if other != parent:
            raise InputError(
                f"{listing.archives[number]} holds the class {label!r} in {other or '.'!r} and in {parent!r}; choose "
                "one with --within"
            )
        other = first.setdefault(number, folder)
        if depth(other) != depth(folder):
            raise InputError(
                f"{listing.archives[number]} holds images in {other or '.'!r} and in {folder!r}: which of their "
                "folders are classes is not clear; choose the folder of the class folders with --within"
            )


def depth(folder: str) -> int:
    return len(folder.split("/")) if folder else 0


def check_parts(listing: Listing) -> None:
    """Refuse ``train`` beside ``val``, or ``images`` beside ``masks``, as if they were classes.

    Raises:
        InputError: naming the folder to choose.
    """
    folders = {posixpath.dirname(image.path) for image in listing.images}
    paths = [folder.split("/") for folder in sorted(folders) if folder]
    common = [names[0] for names in takewhile(lambda names: len(set(names)) == 1, zip(*paths, strict=False))]
    here = sorted({path[len(common)] for path in paths if len(path) > len(common)})
    splits = [name for name in here if SPLIT.fullmatch(name.lower())]
    parts = [name for name in here if name in splits or ROLE.fullmatch(name.lower())]
    if len(parts) > 1:
        best = min(parts, key=lambda name: (not name.lower().startswith(("train", "im")), name))
        raise InputError(
            f"{listing.root} holds {', '.join(map(repr, parts))}, which look like parts of a data set and not like "
            f"classes; choose one with --within {listing.within}{'/'.join([*common, best])}, or give --labels"
        )
    split = next((i for i, name in enumerate(common) if SPLIT.fullmatch(name.lower())), None)
    if split is not None and not listing.archives and len(folders) > 1:
        raise InputError(
            f"{listing.root} holds all its images in folders of {common[split]!r}, which look like the classes; choose "
            f"them with --within {listing.within}{'/'.join(common[: split + 1])}, or give --labels"
        )
