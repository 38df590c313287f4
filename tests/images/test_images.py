"""Images of every kind become the same 8-bit RGB squares, and their classes come from folders, archives or a file."""

import json
import os

import numpy as np
import pytest
import torch
from image_files import RED, encoded, listing, quadrants, write_files, write_tar
from PIL import Image

from ditlit.commands.encode import workers
from ditlit.errors import InputError
from ditlit.images.decoding import BrokenImage, center_crop, decode, preprocess
from ditlit.images.sources import open_images


def pixels(image):
    return np.asarray(decode(image))


def test_kinds_of_image():
    rgb = quadrants()
    expected = np.asarray(rgb)
    grey = rgb.convert("L")
    assert np.array_equal(pixels(encoded(rgb)), expected)
    assert np.array_equal(pixels(encoded(rgb.quantize(4))), expected)  # a palette
    assert np.array_equal(pixels(encoded(grey)), np.asarray(grey)[..., None].repeat(3, -1))
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)  # 16 bits a pixel
    assert np.array_equal(pixels(encoded(deep)), np.asarray(grey)[..., None].repeat(3, -1))
    assert np.array_equal(pixels(encoded(rgb.convert("1")))[..., 0], np.asarray(rgb.convert("1")) * np.uint8(255))
    cmyk = pixels(encoded(rgb.convert("CMYK"), "JPEG", quality=100, subsampling=0))
    assert np.abs(cmyk.astype(int) - expected).max() <= 3  # colours, not their negatives


def test_transparent_parts_show_white_whatever_colour_hides_there():
    image = quadrants().convert("RGBA")
    image.paste((9, 9, 9, 0), (0, 0, 16, 16))
    image.paste((0, 0, 0, 128), (16, 0, 32, 16))
    found = pixels(encoded(image))
    assert (found[:16, :16] == 255).all() and (found[:16, 16:] == 127).all()
    assert np.array_equal(found[16:], np.asarray(quadrants())[16:])
    palette = quadrants().quantize(4)
    found = pixels(encoded(palette, transparency=palette.getpixel((0, 0))))
    assert (found[:16, :16] == 255).all() and np.array_equal(found[16:], np.asarray(quadrants())[16:])


def test_photographs_are_turned_upright():
    upright = quadrants()
    for orientation, turn in ((3, Image.Transpose.ROTATE_180), (6, Image.Transpose.ROTATE_90)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        turned = upright.transpose(turn)  # what the camera wrote; the tag says how to turn it back
        assert np.array_equal(pixels(encoded(turned, exif=exif)), np.asarray(upright))


def test_the_crop_is_central_and_the_filters_are_box_then_bicubic():
    generator = np.random.default_rng(0)
    image = Image.fromarray(generator.integers(0, 256, (40, 64, 3), dtype=np.uint8))
    # 40 -> 20 is the mean of 2x2 pixels, rounded once along each axis.
    array = np.asarray(image).astype(float).reshape(20, 2, 32, 2, 3).mean((1, 3))
    halved = np.asarray(center_crop(image, 20)).astype(float)
    assert np.abs(halved - array[:, 6:26]).max() <= 1
    assert np.array_equal(np.asarray(center_crop(image, 40)), np.asarray(image)[:, 12:52])  # nothing to resize
    short = image.resize((48, 30), Image.Resampling.BICUBIC).crop((9, 0, 39, 30))
    assert np.array_equal(np.asarray(center_crop(image, 30)), np.asarray(short))
    small = image.resize((102, 64), Image.Resampling.BICUBIC).crop((19, 0, 83, 64))
    assert np.array_equal(np.asarray(center_crop(image, 64)), np.asarray(small))  # enlarged
    assert torch.equal(preprocess(encoded(image), 40), torch.from_numpy(np.array(image)[:, 12:52]).permute(2, 0, 1))


BROKEN = {
    "empty": b"",
    "text": b"this is no image",
    "truncated": encoded(Image.effect_noise((64, 64), 50), "JPEG")[:900],
    "floats": encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"),
    "a bomb": encoded(Image.new("1", (20000, 20000))),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_files_that_are_no_image_are_refused(kind):
    with pytest.raises(BrokenImage):
        preprocess(BROKEN[kind], 32)


def test_long_strips_are_resized_in_their_middle_only(monkeypatch):
    sizes = []
    resize = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda *a, **k: sizes.append(a[1]) or resize(*a, **k))
    for shape in ((1, 4000), (4000, 1), (3, 20000)):
        image = Image.fromarray(np.full((*shape, 3), RED, np.uint8))
        assert (preprocess(encoded(image), 64) == torch.tensor(RED)[:, None, None]).all()
    assert (
        max(w * h for w, h in sizes) <= 17 * 64 * 64
    )  # times three bytes; a strip enlarged as a whole is 15 MB and more
    # The part that is kept is that of the whole strip, whichever parity its length has.
    for length in (900, 901):
        ramp = np.linspace(0, 255, length).astype(np.uint8)[None, :, None].repeat(20, 0).repeat(3, 2)
        for picture in (Image.fromarray(ramp), Image.fromarray(ramp.transpose(1, 0, 2))):
            scale = 32 / 20
            whole = resize(picture, tuple(round(side * scale) for side in picture.size), Image.Resampling.BICUBIC)
            left, top = (whole.width - 32) // 2, (whole.height - 32) // 2
            expected = np.asarray(whole.crop((left, top, left + 32, top + 32))).astype(int)
            assert np.abs(np.asarray(center_crop(picture, 32)) - expected).max() <= 1


@pytest.mark.parametrize("format", ["PNG", "WEBP", "JPEG"])
def test_damaged_exif_data_leave_the_pixels_as_they_are(format):
    image = quadrants()
    options = dict(lossless=True) if format == "WEBP" else {}
    whole, expected = pixels(encoded(image, format, **options)), None
    for exif in (
        b"Exif\0\0nonsense",
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0",
    ):
        data = encoded(image, format, exif=exif, **options)
        expected = torch.from_numpy(whole.copy()).permute(2, 0, 1)
        assert torch.equal(preprocess(data, 32), expected)


# Sources


def test_a_tree_of_class_folders(tmp_path):
    write_files(tmp_path, {"dog/b.PNG": b"1", "cat/deep/a.jpg": b"22", "cat/note.txt": b"no", "dog/.hidden.png": b"no"})
    source = open_images(tmp_path)
    assert source.class_names == ["cat", "dog"] and source.num_classes == 2
    assert listing(source) == {"cat/deep/a.jpg": (0, b"22"), "dog/b.PNG": (1, b"1")}


def test_part_of_a_tree(tmp_path):
    write_files(tmp_path, {"train/dog/a.png": b"1", "val/dog/b.png": b"2", "val/cat/c.png": b"3"})
    source = open_images(tmp_path, within="val")
    assert listing(source) == {"val/cat/c.png": (0, b"3"), "val/dog/b.png": (1, b"2")}


def test_a_labels_file(tmp_path):
    write_files(tmp_path, {"a.png": b"1", "b.png": b"2", "sub/c.png": b"3", "d.png": b"4"})
    (tmp_path / "labels.csv").write_text("file,label\nsub/c.png,7\na.png,0\nb.png,7\n")
    source = open_images(tmp_path)
    assert source.num_classes == 8 and source.class_names is None
    assert listing(source) == {"a.png": (0, b"1"), "b.png": (7, b"2"), "sub/c.png": (7, b"3")}
    (tmp_path / "other.csv").write_text("a.png,tench\nb.png,snake\n")
    source = open_images(tmp_path, labels=tmp_path / "other.csv")
    assert source.class_names == ["snake", "tench"] and source.labels.tolist() == [1, 0]


def test_archives_of_class_folders_and_archives_of_one_class_each(tmp_path):
    write_tar(tmp_path / "one.tar", {"set/dog/a.png": b"dog", "./set/cat/b.png": b"cat"})
    source = open_images(tmp_path / "one.tar")
    assert source.class_names == ["cat", "dog"]
    assert sorted(listing(source).values()) == [(0, b"cat"), (1, b"dog")]
    write_tar(tmp_path / "classes" / "n01.tar", {"x.JPEG": b"x"})
    write_tar(tmp_path / "classes" / "n02.tar", {"y.JPEG": b"y", "z.JPEG": b"zz"})
    source = open_images(tmp_path / "classes")
    assert source.class_names == ["n01", "n02"]
    assert listing(source) == {"n01.tar/x.JPEG": (0, b"x"), "n02.tar/y.JPEG": (1, b"y"), "n02.tar/z.JPEG": (1, b"zz")}


def test_webdataset_shards(tmp_path):
    write_tar(tmp_path / "0.tar", {"k0.jpg": b"a", "k0.cls": b"3", "k1.jpg": b"b", "k1.cls": b"1\n"})
    write_tar(tmp_path / "1.tar", {"k2.jpg": b"c", "k2.json": json.dumps({"label": 0}).encode()})
    source = open_images(tmp_path)
    assert source.num_classes == 4 and source.class_names is None
    assert [source.labels[i] for i in range(3)] == [3, 1, 0] and [source.read(i) for i in range(3)] == [
        b"a",
        b"b",
        b"c",
    ]


def test_numbers_of_classes(tmp_path):
    for text, labels, num_classes, names, said in (
        ("a.png,0\nb.png,2\n", [0, 2], 3, None, "1 of the classes 0 to 2 without images, which stay empty: 1"),
        ("a.png,1\nb.png,0\n", [1, 0], 2, None, ""),
        ("a.png,2\nb.png,1\n", [1, 0], 2, ["1", "2"], "classes are numbered from 1 to 2: the store counts from 0"),
        ("a.png,007\nb.png,10\n", [0, 1], 2, ["007", "10"], ""),
        ("a.png,²\nb.png,1.0\n", [1, 0], 2, ["1.0", "²"], ""),
        (
            "a.png,9\nb.png,3\n",
            [9, 3],
            10,
            None,
            "8 of the classes 0 to 9 without images, which stay empty: 0, 1, 2, 4",
        ),
    ):
        write_files(tmp_path, {"a.png": b"1", "b.png": b"2", "labels.csv": text.encode()})
        source = open_images(tmp_path)
        assert (source.labels.tolist(), source.num_classes, source.class_names) == (labels, num_classes, names)
        assert source.said.startswith(said) and bool(said) == bool(source.said)
    for text, message in {
        "a.png,0\nb.png,1440764\n": "class 1440764 would make a store of 1,440,765 classes.*or make names",
        "a.png,0\nb.png,ant\n": "some classes are numbers and others names .such as 0 and 'ant'.",
        "a.png,99999999999999999999\nb.png,ant\n": None,
    }.items():
        (tmp_path / "labels.csv").write_text(text)
        if message:
            with pytest.raises(InputError, match=message):
                open_images(tmp_path)
        else:
            assert open_images(tmp_path).class_names == ["99999999999999999999", "ant"]


def test_a_thousand_archives_are_not_held_open(tmp_path):
    for i in range(40):
        write_tar(tmp_path / f"{i:02}.tar", {"x.png": bytes([i])})
    source = open_images(tmp_path)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    assert [source.read(i) for i in range(40)] == [bytes([i]) for i in range(40)]
    assert not before or len(os.listdir("/proc/self/fd")) < before + 10


def test_archives_are_read_where_the_system_has_no_pread(tmp_path, monkeypatch):
    for call in ("pread", "preadv", "sched_getaffinity"):
        monkeypatch.delattr(os, call, raising=False)
    write_tar(tmp_path / "x.tar", {"cat/a.png": b"cat", "dog/b.png": b"dog"})
    source = open_images(tmp_path / "x.tar")
    assert [source.read(i) for i in range(2)] == [b"cat", b"dog"] and workers(1) >= 1


def test_what_is_wrong_with_an_image_is_said_the_same_in_every_run():
    messages = []
    for data in (b"this is no image", b"this is no image"):
        with pytest.raises(BrokenImage) as error:
            preprocess(data, 32)
        messages.append(str(error.value))
    assert messages[0] == messages[1] == "UnidentifiedImageError: cannot identify image file"


def test_unclear_sources_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"no images at .*nowhere: it does not exist"):
        open_images(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"no images in .*: none ends in \.jpg"):
        open_images(tmp_path)
    write_files(tmp_path / "flat", {"a.png": b"1"})
    with pytest.raises(InputError, match=r"class of 'a.png' is not clear; put the images of each class in a folder"):
        open_images(tmp_path / "flat")
    for text, message in {
        "a.png,1\nb.png,2\n": "line 2: there is no image 'b.png'",
        "a.png,1\na.png,2\n": "line 2: 'a.png' has a class already",
        "a.png\n": "line 1: need two columns",
        "file,label\n": "names none of the images",
        "a.png,-1\n": "numbered from 0, got -1",
    }.items():
        (tmp_path / "l.csv").write_text(text)
        with pytest.raises(InputError, match=message):
            open_images(tmp_path / "flat", labels=tmp_path / "l.csv")
    write_tar(tmp_path / "both.tar", {"train/dog/a.png": b"1", "val/dog/a.png": b"2"})
    with pytest.raises(InputError, match="holds the class 'dog' in 'train' and in 'val'; choose one with --within"):
        open_images(tmp_path / "both.tar")
    (tmp_path / "packed.tar").write_bytes(b"\x1f\x8b" + bytes(600))
    with pytest.raises(InputError, match="compressed archives must be unpacked first"):
        open_images(tmp_path / "packed.tar")
    write_tar(tmp_path / "some.tar", {"k0.jpg": b"a", "k0.cls": b"3", "k1.jpg": b"b"})
    with pytest.raises(InputError, match=r"but 'k1.jpg' has none"):
        open_images(tmp_path / "some.tar")
