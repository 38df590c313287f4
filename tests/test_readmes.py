"""READMEs that do not lead astray: what they link to exists, and the lists of files are those of the folders."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = (".", "configs", "ditlit", "ditlit/commands", "notebooks", "tests")
LISTED = ("configs", "ditlit", "notebooks", "tests")  # with every file in them
WHOLE = {"ablations", "scaling", "curves"}  # folders that one phrase describes


def text_of(folder):
    return (ROOT / folder / "README.md").read_text()


def headings(text):
    """The anchors that GitHub gives to headings."""
    found = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in found}


@pytest.mark.parametrize("folder", FOLDERS)
def test_links_lead_somewhere(folder):
    text = text_of(folder)
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    for link in links:
        path, _, anchor = link.partition("#")
        target = ROOT / folder / path if path else ROOT / folder / "README.md"
        assert target.exists(), link
        if anchor:
            assert anchor in headings(target.read_text()), link


def files_of(folder):
    """Tracked files, or all of a copy without a repository, less what tools leave behind."""
    listed = subprocess.run(["git", "-C", ROOT, "ls-files", "-z", folder], capture_output=True, text=True)
    if listed.returncode == 0 and listed.stdout:
        return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).exists()]
    return [path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts]


@pytest.mark.parametrize("folder", LISTED)
def test_every_file_is_named_and_every_name_is_a_file(folder):
    """By its own name, or by that of its folder where the folder is named as a whole."""
    text = text_of(folder)
    words = {word.rstrip("/") for word in re.findall(r"[\w./-]+", text)}
    names = set()
    for path in files_of(folder):
        parts = path.relative_to(ROOT / folder).parts
        names |= set(parts)
        if path.name in ("README.md", "__init__.py"):
            continue
        assert path.name in words or (parts[0] in words and len(parts) > 1 and WHOLE & set(parts)), path
    listed = re.findall(r"^ *([\w-]+\.(?:py|yaml|ipynb|png|jpg|safetensors))\b", text, re.M)
    assert set(listed) <= names, set(listed) - names
