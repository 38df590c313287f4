"""Files that name the classes of many images: a table such as ``labels.csv``, or StyleGAN's ``dataset.json``."""

import codecs
import csv
import difflib
import io
import json
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

from ditlit.data.manifest import IMAGE_SUFFIXES
from ditlit.errors import InputError
from ditlit.images.files import File, Listing
from ditlit.images.numbering import number_or_name

LABEL_FILES = ("labels.csv", "dataset.json")  # read without being named
SEPARATORS = ",;\t "
SEARCHED = 20_000  # names among which the nearest is sought

Row = tuple[str, str, int | str]  # where it stands, name of the image, label


def label_file(listing: Listing, given: str | Path | None) -> tuple[str, bytes] | None:
    """Path and content of the file that names the classes: the given one, else what is called like one."""
    if given is not None:
        try:
            return str(given), Path(given).read_bytes()
        except OSError as error:
            raise InputError(f"cannot read the labels file {given}: {error.strerror or error}") from None
    files = [File("", name) for name in LABEL_FILES if (listing.root / name).is_file()]
    if len(listing.archives) < 2:  # of several, each may have its own
        files += [file for file in listing.others if file.path in LABEL_FILES]
    found = {path: listing.read(file) for path, file in {listing.location(file): file for file in files}.items()}
    found = {path: data for path, data in found.items() if not is_json(path) or holds_labels(data)}
    if len(found) > 1:
        raise InputError(f"{listing.root} holds {' and '.join(found)}; choose one with --labels")
    return next(iter(found.items()), None)


def labelled(listing: Listing, where: str, data: bytes) -> list[tuple[File, int | str]]:
    """The images that a labels file names, with its labels. Others are left out.

    Names are paths below the root, below ``within``, or below the one archive.

    Raises:
        InputError: where the file cannot be read or names an image that is not there.
    """
    by_name = {image.name: image for image in listing.images}
    bases = ["", listing.within, *(f"{path.name}/{listing.within}" for path in listing.archives[:1])]
    bases = [base for base in bases if len(listing.archives) < 2 or not base]

    def find(name: str) -> File | None:
        relative = name.replace("\\", "/").removeprefix("./").removeprefix(f"{listing.root}/")
        names = [base + each for each in (name, relative) for base in bases]
        return next((by_name[each] for each in names if each in by_name), None)

    rows = read_dataset_json(data, where) if is_json(where) else read_table(data, where, lambda name: bool(find(name)))
    chosen: dict[str, tuple[File, int | str]] = {}
    missing = []
    for line, name, label in rows:
        image = find(name)
        if image is None:
            missing.append((line, name))
        elif image.name in chosen:
            raise InputError(f"{line}: {name!r} has a class already")
        else:
            chosen[image.name] = (image, label)
    if missing:
        line, name = missing[0]
        near = nearest(name, by_name)
        more = f" (nor {len(missing) - 1:,} more that it names)" if len(missing) > 1 else ""
        hint = f"the nearest is {near!r}" if near else f"names are paths such as {next(iter(by_name))!r}"
        raise InputError(f"{line}: there is no image {name!r} in {listing.root}{more}; {hint}")
    if not chosen:
        raise InputError(f"{where} names none of the images")
    for name in by_name:
        if name not in chosen:
            listing.left_out.add("images that it does not name", name)
    return list(chosen.values())


def is_json(path: str) -> bool:
    return path.lower().endswith(".json")


def read_table(data: bytes, where: str, is_image: Callable[[str], bool]) -> Iterator[Row]:
    """The rows of a table of image name and class: separated by commas, semicolons, tabs or spaces, in UTF-8 or UTF-16.

    A first row that names no image, and has the form of none, is a header.

    Args:
        data: of the file.
        where: the file, for messages.
        is_image: whether there is an image of this name.

    Raises:
        InputError: where the file cannot be read, or a row is not of this form.
    """
    try:
        text = data.decode(encoding_of(data))
        separator = max(SEPARATORS, key=lambda separator: fitting(text, separator, is_image))
        for i, (line, row) in enumerate(split(text, separator)):
            if len(row) != 2:
                raise InputError(f"{where} line {line}: need two columns, image name and class, got {row}")
            if i == 0 and not is_image(row[0]) and is_header(*row):
                continue
            if not row[1]:
                raise InputError(f"{where} line {line}: {row[0]!r} has no class; give it one, or delete the line")
            yield f"{where} line {line}", row[0], number_or_name(row[1])
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"cannot read the labels file {where}: {error}; save it as CSV in UTF-8") from None


def encoding_of(data: bytes) -> str:
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if b"\0" in data[:2]:  # no byte order mark, but the first character is of ASCII
        return "utf-16-be" if data[0] == 0 else "utf-16-le"
    return "utf-8-sig"


def split(text: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    """The rows that are not blank, without empty cells at their end, and their lines."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)
    for cells in reader:
        row = [cell.strip() for cell in cells]
        while len(row) > 2 and not row[-1]:
            row.pop()
        if any(row):
            yield reader.line_num, row


def fitting(text: str, separator: str, is_image: Callable[[str], bool]) -> tuple[int, int]:
    """How many of the first rows name an image and a class, and how many have two columns, with this separator."""
    try:
        rows = [row for _, row in islice(split(text, separator), 1000) if len(row) == 2]
    except csv.Error:
        return 0, 0
    return sum(is_image(row[0]) for row in rows), len(rows)


def is_header(name: str, label: str) -> bool:
    return not name.lower().endswith(IMAGE_SUFFIXES) and "/" not in name and not label.lstrip("-").isdigit()


def read_dataset_json(data: bytes, where: str) -> Iterator[Row]:
    """The rows of ``{"labels": [[name, class], ...]}``, the form of the data sets of StyleGAN and EDM.

    Raises:
        InputError: for anything else.
    """
    try:
        labels = json.loads(data)["labels"]
        rows = list(labels.items() if isinstance(labels, dict) else labels)
    except (ValueError, LookupError, TypeError):
        raise InputError(
            f'{where} holds no labels; they have the form {{"labels": [[image name, class], ...]}}'
        ) from None
    for i, row in enumerate(rows):
        match row:
            case [str(name), int() | str() as label] if not isinstance(label, bool):
                yield f"{where} entry {i + 1}", name, label
            case _:
                raise InputError(f"{where} entry {i + 1}: need image name and class, a number or a name, got {row!r}")


def holds_labels(data: bytes) -> bool:
    """Whether a ``dataset.json`` is one with labels; one that cannot be read is for its reader to refuse."""
    try:
        return bool(json.loads(data).get("labels"))
    except AttributeError:
        return False
    except ValueError:
        return True


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The name that someone who wrote ``name`` may have meant."""

    def stem(name: str) -> str:
        return name.rsplit("/", 1)[-1].rsplit(".", 1)[0]

    names = list(names)
    same = [other for other in names if stem(other) == stem(name)]
    return next(iter(same or difflib.get_close_matches(name, names[:SEARCHED], 1)), None)
