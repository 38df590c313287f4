"""Files beside images that name their classes, as in webdataset: ``k.cls``, ``k.cls.txt`` or ``k.json``."""

import json
from collections.abc import Iterator

from ditlit.errors import InputError
from ditlit.images.archives import NOWHERE
from ditlit.images.files import File, Listing
from ditlit.images.numbering import number_or_name

SIDECARS = (".cls", ".cls.txt", ".json")  # in the order in which they are believed


def sidecar_labels(listing: Listing) -> tuple[dict[str, int | str], set[str]]:
    """What the files beside images say, by the part of the name that they share with them, and these files' paths."""
    labels: dict[str, int | str] = {}
    used = set()
    for stem, files in find_sidecars(listing).items():
        for file in files:
            label = sidecar_label(file.name, listing.read(file))
            if label == "":
                raise InputError(f"{listing.location(file)} is empty; it should name the class of its image")
            if label is not None:
                labels[stem] = label
                used.add(listing.location(file))
                break
    return labels, used


def sidecar_label(name: str, data: bytes) -> int | str | None:
    if name.endswith(".json"):
        try:
            label = json.loads(data)
        except ValueError:
            return None
        label = label.get("label") if isinstance(label, dict) else None
        return label if isinstance(label, (int, str)) else None
    return number_or_name(data.decode(errors="replace"))


def find_sidecars(listing: Listing) -> dict[str, list[File]]:
    """The files that may tell the class of an image, by the part of its name that they share; the first come first."""
    files = [file for file in listing.others if file.name.endswith(SIDECARS) and file.size != NOWHERE]
    possible = {stem for image in listing.images for stem in stems(image.name)} if files else set()
    found: dict[str, list[File]] = {}
    for suffix in SIDECARS:
        for file in files:
            stem = file.name.removesuffix(suffix)
            if len(stem) < len(file.name) and stem in possible:
                found.setdefault(stem, []).append(file)
    return found


def stems(name: str) -> Iterator[str]:
    """What a sidecar of this image may be called, without its own suffix: ``a/b.c.jpg``, ``a/b.c``, ``a/b``."""
    yield name
    first = name.rfind("/") + 2
    while (dot := name.rfind(".", first)) >= 0:
        name = name[:dot]
        yield name


def one_of_each_sample(listing: Listing, labels: dict[str, int | str]) -> list[tuple[File, int | str]]:
    """Images with the labels of their sidecars. Of several images of one sidecar, as samples of webdataset have, the
    one that is called like it: ``k.jpg`` and not ``k.depth.png`` with ``k.cls``.

    Raises:
        InputError: where an image has no label, or none or several are called like their sidecar.
    """
    samples: dict[str, list[File]] = {}
    for image in listing.images:
        stem = next((stem for stem in stems(image.name) if stem in labels), None)
        if stem is None:
            raise InputError(
                f"{listing.root}: some images have a {', '.join(SIDECARS[:-1])} or {SIDECARS[-1]} file beside them, "
                f"but {image.path!r} has none; add it, or name the images to use with --labels"
            )
        samples.setdefault(stem, []).append(image)
    chosen = []
    for stem, files in samples.items():
        namesakes = [file for file in files if stem in (file.name, file.stem)] if len(files) > 1 else files
        if len(namesakes) != 1:
            a, b, *_ = (file.name for file in namesakes or files)
            raise InputError(
                f"{listing.root}: {a!r} and {b!r} share one label; name the images to use with --labels, a CSV file of "
                "image name and class"
            )
        for file in files:
            if file is namesakes[0]:
                chosen.append((file, labels[stem]))
            else:
                listing.left_out.add("further images of a sample", file.name)
    return chosen
