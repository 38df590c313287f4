"""Which images a folder or an archive holds, and of which classes: whatever else lies there is left out and counted."""

import json
import os
import tarfile

import pytest
from image_files import encoded, listing, quadrants, write_files, write_tar

from ditlit.errors import InputError
from ditlit.images.sources import open_images


def test_what_systems_and_tools_leave_behind_are_no_classes(tmp_path):
    files = {
        "cat/a.png": b"a", "dog/b.png": b"b", "cat/._a.png": b"x", "cat/Thumbs.db": b"x",
        ".ipynb_checkpoints/a.png": b"x",
        "@eaDir/cat/a.png": b"x", "__MACOSX/cat/a.png": b"x", "dog/.trash/c.png": b"x",
        "notes.txt": b"x", "bird/c.heic": b"x",
    }  # fmt: skip
    write_files(tmp_path / "tree", files)
    write_tar(tmp_path / "t.tar", files)
    for images, base, hidden in ((tmp_path / "tree", "", 6), (tmp_path / "t.tar", "t.tar/", 6)):
        source = open_images(images)
        assert listing(source) == {f"{base}cat/a.png": (0, b"a"), f"{base}dog/b.png": (1, b"b")}
        assert source.about.startswith("2 images in 2 classes (cat, dog), by folder; left out: ")
        assert f"hidden files and folders: {hidden} (" in source.about
        assert "files that are no images: 2 (.heic, .txt)" in source.about
    assert "folders without images: 1 (bird)" in open_images(tmp_path / "tree").about
    names = [f"{k}/a.png" for k in "abcde"]
    write_files(tmp_path / "clean", dict.fromkeys(names, b""))
    assert (
        open_images(tmp_path / "clean").about == "5 images in 5 classes (a, b, c, ...), by folder; nothing is left out"
    )


@pytest.mark.parametrize(
    ("names", "within"),
    [
        (("train/cat/a.png", "val/dog/b.png", "test/c.png"), "train"),
        (("training_set/cat/a.png", "test_set/cat/b.png"), "training_set"),
        (("data/train/cat/a.png", "data/train/dog/b.png"), "data/train"),
        (("set/train2017/cat/a.png", "set/val2017/cat/b.png"), "set/train2017"),
        (("images/a.png", "masks/a.png"), "images"),
    ],
)
def test_parts_of_a_data_set_are_no_classes(tmp_path, names, within):
    write_files(tmp_path, dict.fromkeys(names, b"1"))
    with pytest.raises(InputError, match=f"with --within {within}(,|$)"):
        open_images(tmp_path)
    (tmp_path / "labels.csv").write_text("".join(f"{name},cat\n" for name in names))  # says what is meant
    assert len(open_images(tmp_path)) == len(names)


def test_folders_that_are_called_like_parts_may_be_classes(tmp_path):
    write_files(tmp_path, {"train/a.png": b"", "car/b.png": b"", "bus/red/c.png": b""})
    assert open_images(tmp_path).class_names == ["bus", "car", "train"]


def test_parts_and_depths_in_archives(tmp_path):
    write_tar(tmp_path / "parts.tar", {"set/train/dog/a.png": b"1", "set/val/cat/a.png": b"2"})
    with pytest.raises(InputError, match=r"'train', 'val', which look like parts .* --within set/train, or"):
        open_images(tmp_path / "parts.tar")
    assert open_images(tmp_path / "parts.tar", within="set/train/").class_names == ["dog"]
    for names in (("dog/a.png", "cat/deep/b.png"), ("a.png", "cat/b.png")):
        write_tar(tmp_path / "deep.tar", dict.fromkeys(names, b""))
        with pytest.raises(InputError, match=r"which of their folders are classes is not clear; .* --within"):
            open_images(tmp_path / "deep.tar")


def test_an_archive_beside_images_is_a_contradiction(tmp_path):
    write_files(tmp_path, {"train/cat/a.png": b"1", "train/dog/b.png": b"2"})
    write_tar(tmp_path / "leftover.tar", {"x.png": b"3"})
    with pytest.raises(
        InputError, match=r"archives \(leftover.tar\) and images outside of them \(train/cat/a.png\): give"
    ):
        open_images(tmp_path)
    assert open_images(tmp_path, within="train").class_names == ["cat", "dog"]
    for images in (tmp_path, tmp_path / "leftover.tar"):
        with pytest.raises(InputError, match=f"nothing in the folder 'trian/' of {images}, which --within names"):
            open_images(images, within="trian")
    assert open_images(tmp_path / "leftover.tar").class_names == ["leftover"]


def test_masks_are_no_images(tmp_path):
    names = ["x.jpg", "x_mask.png", "x.seg.png", "x_mask_1.png", "y_mask.png", "x.v2.jpg", "x-2.jpg"]
    write_files(tmp_path, {f"cat/{name}": b"" for name in names})
    source = open_images(tmp_path)
    assert [source.name(i) for i in range(len(source))] == [
        "cat/x-2.jpg",
        "cat/x.jpg",
        "cat/x.v2.jpg",
        "cat/y_mask.png",
    ]
    assert "masks beside their images: 3 (cat/x.seg.png, cat/x_mask.png, cat/x_mask_1.png)" in source.about


def test_sidecars_belong_to_the_image_that_shares_most_of_their_name(tmp_path):
    files = {
        "n01.5.JPEG": b"a", "n01.5.cls": b"3", "n01.77.JPEG": b"b", "n01.77.cls.txt": b"1\n",
        "k.jpg": b"c", "k.cls": b"0",
        "k.mask.png": b"x", "k.small.jpg": b"x", "p.png": b"d", "p.png.json": b'{"label": 2}',
        "k.json": b'{"label": "no"}',
    }  # fmt: skip
    write_files(tmp_path / "tree", files)
    write_tar(tmp_path / "t.tar", files)
    for images, base in ((tmp_path / "tree", ""), (tmp_path / "t.tar", "t.tar/")):
        source = open_images(images)
        found = {"n01.5.JPEG": (3, b"a"), "n01.77.JPEG": (1, b"b"), "k.jpg": (0, b"c"), "p.png": (2, b"d")}
        assert listing(source) == {base + name: value for name, value in found.items()}
        assert f"further images of a sample: 1 ({base}k.small.jpg)" in source.about and ", as the files" in source.about
    # Without sidecars, names with dots are names.
    write_tar(tmp_path / "dots.tar", {"cat/img.v2.001.jpg": b"", "cat/img.v2.002.jpg": b"", "cat/img.jpg": b""})
    assert len(open_images(tmp_path / "dots.tar")) == 3
    for names, message in (
        (("k.a.jpg", "k.b.jpg", "k.cls"), "'t.tar/k.a.jpg' and 't.tar/k.b.jpg' share one label; name the images"),
        (("k.jpg", "k.png", "k.cls"), "'t.tar/k.jpg' and 't.tar/k.png' share one label"),
    ):
        write_tar(tmp_path / "t.tar", dict.fromkeys(names, b"1"))
        with pytest.raises(InputError, match=message):
            open_images(tmp_path / "t.tar")
    write_tar(tmp_path / "t.tar", {"k.jpg": b"", "k.cls": b" "})
    with pytest.raises(InputError, match=r"t.tar/k.cls is empty; it should name the class"):
        open_images(tmp_path / "t.tar")


ROWS = "a.png,cat\nsub/b.png,dog\n"


@pytest.mark.parametrize(
    "table",
    [
        ROWS.encode(),
        b"\xef\xbb\xbf" + ROWS.encode(),
        ROWS.replace("\n", "\r\n").encode("utf-16"),
        ("file,label\n" + ROWS).encode("utf-16-be"),
        ROWS.replace(",", ";").encode(),
        ("name\tclass\n" + ROWS.replace(",", "\t")).encode(),
        ROWS.replace(",", " ").encode(),
        b'image,label,\n"a.png", "cat",\n\n./sub/b.png,dog,\n',
        b"a.png,cat\nsub\\b.png,dog\n",
    ],
)
def test_tables_of_every_form(tmp_path, table):
    write_files(tmp_path, {"a.png": b"1", "sub/b.png": b"2", "c.png": b"3", "labels.csv": table})
    source = open_images(tmp_path)
    assert source.class_names == ["cat", "dog"] and listing(source) == {"a.png": (0, b"1"), "sub/b.png": (1, b"2")}
    assert source.about.endswith(f", as {tmp_path}/labels.csv says; left out: images that it does not name: 1 (c.png)")


def test_names_that_hold_separators(tmp_path):
    write_files(tmp_path, {"a,1.png": b"1", "b 2;.png": b"2", "labels.csv": b"a,1.png\tcat\nb 2;.png\tdog\n"})
    assert open_images(tmp_path).class_names == ["cat", "dog"]


def test_labels_files_in_an_archive_and_below_within(tmp_path):
    write_tar(tmp_path / "t.tar", {"a.png": b"1", "sub/b.png": b"2", "labels.csv": ROWS.encode()})
    assert listing(open_images(tmp_path / "t.tar")) == {"t.tar/a.png": (0, b"1"), "t.tar/sub/b.png": (1, b"2")}
    write_files(tmp_path / "tree", {"train/a.png": b"1", "train/sub/b.png": b"2", "train/labels.csv": ROWS.encode()})
    assert listing(open_images(tmp_path / "tree", within="train"))["train/sub/b.png"] == (1, b"2")


def test_the_labels_of_stylegan(tmp_path):
    write_files(tmp_path, {"00000/img0.png": b"1", "00000/img1.png": b"2"})
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": [["00000/img0.png", 4], ["00000/img1.png", 0]]}))
    assert open_images(tmp_path).labels.tolist() == [4, 0]
    for text, message in {
        '{"labels": [["00000/img0.png", [0, 1]]]}': r"entry 1: need image name and class, .*, got \[",
        '{"labels": [["img0.png", 1]]}': "entry 1: there is no image 'img0.png' in .*; the nearest is '00000/img0.png'",
        '{"labels": [["00000': "dataset.json holds no labels",
    }.items():
        (tmp_path / "dataset.json").write_text(text)
        with pytest.raises(InputError, match=message):
            open_images(tmp_path)
    (tmp_path / "dataset.json").write_text('{"labels": null}')  # of a data set without classes
    assert open_images(tmp_path).class_names == ["00000"]
    (tmp_path / "dataset.json").write_text('{"labels": [["00000/img0.png", 1]]}')
    (tmp_path / "labels.csv").write_text("00000/img0.png,1\n")
    with pytest.raises(InputError, match=r"holds .*labels.csv and .*dataset.json; choose one with --labels"):
        open_images(tmp_path)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (b"c.png,1\na.png,2\n", "line 1: there is no image 'c.png' in"),  # a first row, not a header
        (
            b"sub/bb.png,1\na.png,2\nz.png,1\n",
            r"line 1: there is no image 'sub/bb.png' .*\(nor 1 more .*is 'sub/b.png'",
        ),
        (b"b.jpg,1\n", "the nearest is 'sub/b.png'"),
        (b"file,label\na.png,\n", "line 2: 'a.png' has no class; give it one, or delete the line"),
        (b"a.png,caf\xe9\n", "cannot read the labels file .*save it as CSV in UTF-8"),
        (b"a.png,1,2\n", "line 1: need two columns"),
    ],
)
def test_mistakes_in_tables(tmp_path, table, message):
    write_files(tmp_path, {"a.png": b"1", "sub/b.png": b"2", "labels.csv": table})
    with pytest.raises(InputError, match=message):
        open_images(tmp_path)


def test_links_in_folders(tmp_path):
    write_files(tmp_path, {"tree/cat/a.png": b"1", "elsewhere/b.png": b"2"})
    (tmp_path / "tree" / "dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "tree" / "cat" / "up").symlink_to(tmp_path / "tree")
    (tmp_path / "tree" / "self").symlink_to("self")
    source = open_images(tmp_path / "tree")
    assert listing(source) == {"cat/a.png": (0, b"1"), "dog/b.png": (1, b"2")}
    assert "links to a folder that they lie in: 1 (cat/up)" in source.about
    (tmp_path / "tree" / "cat" / "lost.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(InputError, match=r"1 of 3 images are links that lead nowhere, such as 'cat/lost.png'; restore"):
        open_images(tmp_path / "tree")


def add_links(path, links):
    with tarfile.open(path, "a") as tar:
        for name, (kind, target) in links.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)


def test_links_in_archives(tmp_path):
    write_tar(tmp_path / "t.tar", {"./store/1": b"one", "cat/a.png": b"two"})
    links = {
        "cat/hard.png": (tarfile.LNKTYPE, "./store/1"), "cat/soft.png": (tarfile.SYMTYPE, "../store/1"),
        "dog/again.png": (tarfile.SYMTYPE, "../cat/hard.png"),
    }  # fmt: skip
    add_links(tmp_path / "t.tar", links)
    found = {
        "cat/a.png": (0, b"two"),
        "cat/hard.png": (0, b"one"),
        "cat/soft.png": (0, b"one"),
        "dog/again.png": (1, b"one"),
    }
    assert listing(open_images(tmp_path / "t.tar")) == {f"t.tar/{name}": value for name, value in found.items()}
    write_tar(tmp_path / "links.tar", {})
    add_links(
        tmp_path / "links.tar", {"cat/a.png": (tarfile.SYMTYPE, "/data/a.png"), "cat/b.png": (tarfile.SYMTYPE, "b.png")}
    )
    with pytest.raises(
        InputError, match=r"2 of 2 images are links that lead nowhere.*pack the archive with tar --derefer"
    ):
        open_images(tmp_path / "links.tar")


def test_concatenated_and_updated_archives(tmp_path):
    write_tar(tmp_path / "1.tar", {"cat/a.png": b"old", "cat/b.png": b"b"})
    write_tar(tmp_path / "2.tar", {"dog/c.png": b"c", "cat/a.png": b"new"})
    (tmp_path / "both.tar").write_bytes((tmp_path / "1.tar").read_bytes() + (tmp_path / "2.tar").read_bytes())
    source = open_images(tmp_path / "both.tar")
    found = {"cat/a.png": (0, b"new"), "cat/b.png": (0, b"b"), "dog/c.png": (1, b"c")}
    assert listing(source) == {f"both.tar/{name}": value for name, value in found.items()}
    assert "older versions of a file in its archive: 1 (cat/a.png)" in source.about


def test_cut_and_damaged_archives_are_refused(tmp_path):
    path = tmp_path / "t.tar"
    write_tar(path, {"cat/a.png": bytes(700), "cat/b.png": bytes(700)})  # 512 of header and 1024 of data each
    whole = path.read_bytes()
    for data, message in (
        (whole[:2600], "t.tar is cut or damaged in or after 'cat/b.png' .*ends at byte 2,600.; copy or pack it again"),
        (whole[:1700], "t.tar is cut: it ends at byte 1,700 without the blocks of zeros.*pack it again$"),
        (whole[:1536], "t.tar is cut: it ends at byte 1,536 without the blocks of zeros.*truncate"),
        (whole[:1536] + b"x" * 512 + whole[2048:], "t.tar is damaged: no entry of a tar archive begins at byte 1,536"),
        (whole + b"x" * 512, "no entry of a tar archive begins at byte 10,240"),
        (b"", "cannot be read as a tar archive"),
    ):
        path.write_bytes(data)
        with pytest.raises(InputError, match=message):
            open_images(path)


def test_kinds_of_file_names(tmp_path):
    jpeg, png = encoded(quadrants(), "JPEG"), encoded(quadrants())
    files = {
        "cat/a.jfif": jpeg,
        "cat/b.avif": b"",
        "cat/plain": jpeg,
        "cat/12.345": png,
        "cat/README": b"no",
        "cat/1.20": b"no",
    }
    write_files(tmp_path / "tree", files)
    write_tar(tmp_path / "t.tar", files)
    for images, base in ((tmp_path / "tree", ""), (tmp_path / "t.tar", "t.tar/")):
        source = open_images(images)
        assert set(listing(source)) == {f"{base}cat/{name}" for name in ("a.jfif", "b.avif", "plain", "12.345")}


def test_the_order_of_the_file_system_does_not_matter(tmp_path, monkeypatch):
    write_files(tmp_path, {f"{k}/{i}.png": b"" for k in "dca" for i in (2, 1, 10)} | {"a/x.txt": b"", "c/y.csv": b""})
    first = open_images(tmp_path)
    scandir, listdir = os.scandir, os.listdir
    monkeypatch.setattr(os, "scandir", lambda path: reversed(list(scandir(path))))
    monkeypatch.setattr(os, "listdir", lambda path: list(reversed(listdir(path))))
    second = open_images(tmp_path)
    assert (list(listing(first).items()), first.about) == (list(listing(second).items()), second.about)
