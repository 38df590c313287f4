"""Folders on a disk and at URLs: whole files or none, transient errors tried again, others reported at once."""

from pathlib import Path

import pytest

from ditlit.data import folders
from ditlit.data.folders import LocalFolder, RemoteFolder, check_output, open_folder, persistently
from ditlit.errors import InputError


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    monkeypatch.setattr(folders, "WAITS", (0.0, 0.0))


@pytest.fixture(params=["local", "remote"])
def folder(request, tmp_path):
    return open_folder(tmp_path / "store" if request.param == "local" else f"memory://{tmp_path.name}/store")


def test_what_is_written_is_read_and_listed(folder):
    assert folder.names() == set()
    folder.write("a", b"1")
    folder.write("b", b"2")
    folder.write("a", b"3")
    assert folder.names() == {"a", "b"} and folder.read("a") == b"3"
    assert folder.location("a").endswith("store/a")


def test_paths_and_urls_are_told_apart(tmp_path):
    assert isinstance(open_folder(tmp_path), LocalFolder) and isinstance(open_folder(str(tmp_path)), LocalFolder)
    assert isinstance(open_folder("memory://x"), RemoteFolder)
    with pytest.raises(InputError, match=r"cannot open nowhere://x: .*nowhere"):
        open_folder("nowhere://x")


@pytest.mark.parametrize("url", ["s3://bucket/x.json", "hf://datasets/a/b/x.json"])
def test_results_are_not_written_into_folders_that_are_called_like_urls(url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    where = url.removesuffix("/x.json")
    with pytest.raises(InputError, match=f"local folder, not to {where}: choose one with --out"):
        check_output(Path(url), "--out")
    check_output(Path("s3/a:b/x.json"), "--out")
    assert [path.name for path in tmp_path.iterdir()] == ["s3"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    folder = LocalFolder(tmp_path)
    folder.write("a", b"old")

    def full(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr(folders.os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        folder.write("a", b"new")
    assert folder.read("a") == b"old" and folder.names() == {"a"}


def test_transient_errors_are_tried_again():
    results = [ConnectionError("reset"), TimeoutError("late"), "done"]

    def call():
        result = results.pop(0)
        if isinstance(result, Exception):
            raise result
        return result

    assert persistently(call, "memory://x") == "done"


@pytest.mark.parametrize(
    ("error", "calls", "message"),
    [
        (ConnectionError("reset"), 3, "cannot access memory://x after 3 attempts: ConnectionError: reset"),
        (FileNotFoundError("gone"), 1, "cannot access memory://x: FileNotFoundError: gone"),
        (PermissionError("no"), 1, "cannot access memory://x: PermissionError: no"),
    ],
)
def test_lasting_errors_name_the_url(error, calls, message):
    count = 0

    def call():
        nonlocal count
        count += 1
        raise error

    with pytest.raises(InputError, match=message):
        persistently(call, "memory://x")
    assert count == calls


def test_a_download_appears_only_when_it_is_right(tmp_path):
    folder = open_folder(f"memory://{tmp_path.name}/x")
    folder.write("a", b"right")
    seen = []

    def check(path):
        seen.append(path.read_bytes())
        assert not (tmp_path / "copy").exists()
        if len(seen) < 3:
            raise OSError("not yet")

    folder.download("a", tmp_path / "copy", check)
    assert seen == [b"right"] * 3 and (tmp_path / "copy").read_bytes() == b"right"
    with pytest.raises(InputError, match=r"/x/a after 3 attempts: OSError: wrong"):
        folder.download("a", tmp_path / "other", lambda path: (_ for _ in ()).throw(OSError("wrong")))
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]
