"""What a file is that cannot be read as a checkpoint, and what to do about it."""

import re
from pathlib import Path

from ditlit.errors import InputError

TORCH_PICKLES = (b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9",)  # how files of torch.save began before they were archives
PICKLED = re.compile(r"GLOBAL ([\w.]+)")


def unreadable(path: str | Path, kind: str, error: Exception) -> InputError:
    """The error for a file that is no ``kind``, from its first bytes and what its reader said."""
    with open(path, "rb") as file:
        head = file.read(256)
    what = diagnosis(path, head, str(error))
    first_line = (str(error).splitlines() or [type(error).__name__])[0]
    why = f"; it may be truncated or foreign: {first_line}" if what is None else f": it {what}"
    return InputError(f"{path} cannot be read as {kind}{why}")


def diagnosis(path: str | Path, head: bytes, said: str) -> str | None:
    """What a file is by its first bytes, and the remedy; None where that is not known."""
    if not head:
        return "is empty: write or download it again"
    if head.startswith(b"version https://git-lfs"):
        return (
            "is a Git LFS pointer, a few lines that stand for the weights: run git lfs pull in its repository, or "
            "download the file itself"
        )
    if head.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "is a web page: its download went wrong; download the file itself"
    foreign = PICKLED.search(said)
    if foreign or (head.startswith(b"\x80") and not head.startswith(TORCH_PICKLES)):
        what = f"an object of {foreign[1]}" if foreign else "objects"
        return (
            f"holds {what} as a Python pickle, which may run any code and is not read. Where you trust it, write its "
            f"weights alone: torch.save(torch.load({str(path)!r}, weights_only=False).state_dict(), 'weights.pt') for "
            "a module, the dict of tensors inside it otherwise"
        )
    return None
