"""The loss by timestep, and plain words for each of the usual mistakes."""

import errno
import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from calls import evaluate_loss
from lightning.pytorch import Trainer

from ditlit import checkpoints
from ditlit.commands.evaluate_loss import compare_weights, compute, wrong_labels
from ditlit.data import DigitsDataModule, LatentStore, write_store
from ditlit.data.digits import load_digits
from ditlit.diffusion import GaussianDiffusion
from ditlit.errors import InputError
from ditlit.evaluation.losses import AverageDistance, Latents, Losses, by_timestep, findings, reference_for
from ditlit.models import DiT
from ditlit.training import EMA, DiTModule

GOOD = Latents(1.0, 5.5, {"scale": [0.18]}, {"scale": [0.18]})


def losses(right=0.3, null=0.35, wrong=0.4, raw=None, n=1000):
    """Errors with these means, paired as errors of the same samples are."""
    rng = np.random.default_rng(0)
    common = 0.1 * rng.random(n) - 0.05
    arrays = [mean + common + 0.01 * rng.standard_normal(n) for mean in (right, null, wrong)]
    return Losses(rng.integers(0, 1000, n), *arrays, None if raw is None else raw + common)


def test_errors_are_averaged_in_bins_of_timesteps():
    t = np.array([0, 99, 100, 250, 299])
    means, errors = by_timestep(t, np.array([1.0, 3.0, 5.0, 7.0, 8.0]), np.array([0, 100, 200, 300, 400]))
    np.testing.assert_allclose(means, [2, 5, 7.5, np.nan])
    np.testing.assert_allclose(errors, [1, np.nan, 0.5, np.nan])


def test_what_predicting_nothing_costs_depends_on_the_process():
    flow = replace(losses(right=1.2, null=1.3, wrong=1.4), untrained=2.0)
    assert findings(flow, GOOD) == []
    assert "about that of predicting nothing (2)" in findings(replace(flow, right=flow.right + 0.7), GOOD)[0]
    assert "about that of predicting nothing (1)" in findings(replace(flow, untrained=1.0), GOOD)[0]


def test_nothing_is_said_of_a_healthy_run():
    assert findings(losses(raw=0.31), GOOD, AverageDistance(10_000, 0.05, 0.6)) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(latents=Latents(5.5, 5.5, GOOD.trained_on, GOOD.stored)), "a scaling factor is missing"),
        (dict(latents=Latents(0.18, 1.0, GOOD.trained_on, GOOD.stored)), "applied twice"),
        (dict(latents=Latents(1.0, 1.0, {"scale": [0.18]}, {"scale": [1.0]})), "lacks the scaling factor"),
        (dict(losses=losses(right=0.99, null=0.99, wrong=0.99)), "have learned little"),
        (dict(losses=losses(right=np.nan)), "the loss is NaN"),
        (dict(losses=losses(wrong=0.3)), "the labels are ignored"),
        (dict(losses=losses(wrong=0.28)), "the classes are numbered otherwise"),
        (dict(losses=losses(null=0.5)), "the null label gives a higher error than wrong labels"),
        (dict(losses=losses(null=0.3)), "it is not what it was in training"),
        (dict(average=AverageDistance(1000, 0.0, 1.0)), "equals the raw weights to the bit"),
        (dict(average=AverageDistance(1000, 0.9, 0.0)), "the moving average does not move"),
        (
            dict(losses=losses(raw=0.2), average=AverageDistance(1000, 0.5, 0.5)),
            "1.50 times that of the raw weights: it lags",
        ),
    ],
)
def test_each_mistake_is_named(changes, message):
    found = findings(**(dict(losses=losses(), latents=GOOD, average=AverageDistance(1000, 0.1, 0.5)) | changes))
    assert len(found) == 1 and message in found[0]


def test_a_curve_far_above_the_recipes_is_named_once_the_run_is_as_long():
    reference = {"recipe": "r.yaml", "step": 1000, "edges": [0, 500, 1000], "mse": [0.3, 0.1]}
    (found,) = findings(losses(), GOOD, None, reference, step=1000)
    assert "at timesteps 500 to 1000 the error is 3.0" in found and "r.yaml after 1,000 steps" in found
    assert findings(losses(), GOOD, None, reference, step=500) == []


def test_wrong_labels_are_of_other_classes_that_the_store_has():
    labels = torch.tensor([2, 5, 9]).repeat(100)
    wrong = wrong_labels(labels, 0, 10)
    assert not (wrong == labels).any() and set(wrong.tolist()) == {2, 5, 9}
    wrong = wrong_labels(torch.full((100,), 3), 0, 10)  # of one class: of any other that the model knows
    assert set(wrong.tolist()) == {0, 1, 2, 4, 5, 6, 7, 8, 9}
    assert wrong_labels(torch.zeros(4).long(), 0, 1) is None


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small DiT after some steps on digits, its checkpoint and stores."""
    folder = tmp_path_factory.mktemp("digits")
    torch.manual_seed(0)
    denoiser = DiT(input_size=8, in_channels=1, num_classes=10, patch_size=2, hidden_size=48, depth=2, num_heads=2)
    module = DiTModule(denoiser, GaussianDiffusion(), lambda p: torch.optim.AdamW(p, lr=5e-3), ema=EMA(0.9))
    trainer = Trainer(accelerator="cpu", devices=1, max_steps=120, logger=False, enable_checkpointing=False,
                      enable_progress_bar=False, enable_model_summary=False, val_check_interval=1000,
                      check_val_every_n_epoch=None, num_sanity_val_steps=0, default_root_dir=folder)  # fmt: skip
    trainer.fit(module, DigitsDataModule(str(folder / "data"), global_batch_size=64))
    trainer.save_checkpoint(folder / "x.ckpt")
    return folder


def run(trained, store, capsys, **changes):
    evaluate_loss(str(trained / "x.ckpt"), str(store), accelerator="cpu", **changes)
    return capsys.readouterr().out


def test_a_trained_model_is_told_from_its_own_mistakes(trained, capsys, tmp_path):
    out = tmp_path / "loss.json"
    text = run(trained, trained / "data" / "val", capsys, out=str(out), draws=2)
    report = json.loads(out.read_text())
    assert "numbered otherwise" not in text and "scaling" not in text and "the moving average" not in text
    assert report["mse"][0] > 3 * report["mse"][-1] > 0 and report["step"] == 120  # little noise is hard to see
    images, labels = load_digits()
    about = dict(num_classes=10, image_size=8)
    write_store(tmp_path / "unscaled", 5 * images[:100], labels[:100], **about)
    assert "a scaling factor is missing" in run(trained, tmp_path / "unscaled", capsys)
    write_store(tmp_path / "other", images[:100], labels[:100], scale=[1.2], **about)
    assert "trained on latents with {'shift': [0.0], 'scale': [1.0]}" in run(trained, tmp_path / "other", capsys)


def test_a_store_of_some_classes_is_judged_by_their_names(trained, capsys, tmp_path):
    images, labels = load_digits()
    few = (labels == 3) | (labels == 7)
    images, labels = images[few][:40], (labels[few][:40] == 3).long()  # 7 is class 0 here, and 3 class 1
    found = {}
    for name, about, settings in (
        ("named", dict(class_names=["7", "3"]), {}),
        ("more", dict(class_names=["7", "3", "none"], num_classes=3), {}),
        ("told", {}, dict(store_classes="7,3")),
        ("mistaken", {}, dict(store_classes=[3, 7])),
    ):
        write_store(tmp_path / name, images, labels, **(dict(num_classes=2, image_size=8) | about))
        run(trained, tmp_path / name, capsys, out=str(tmp_path / f"{name}.json"), draws=1, **settings)
        found[name] = json.loads((tmp_path / f"{name}.json").read_text())["mse"]
    assert found["named"] == found["more"] == found["told"] != found["mistaken"]


def test_a_store_of_one_class_is_judged(trained, capsys, tmp_path):
    images, labels = load_digits()
    threes = images[labels == 3][:40]
    write_store(tmp_path / "threes", threes, torch.zeros(len(threes)).long(), 1, class_names=["3"], image_size=8)
    assert "all  " in run(trained, tmp_path / "threes", capsys, draws=1)


def test_of_a_model_of_one_class_no_label_is_judged(tmp_path, capsys, source):
    denoiser = DiT(input_size=8, in_channels=1, num_classes=1, patch_size=4, hidden_size=16, depth=1, num_heads=2)
    ckpt = source(denoiser, latents={"shift": [0.0], "scale": [1.0]})
    write_store(tmp_path / "one", load_digits()[0][:20], torch.zeros(20).long(), 1, image_size=8)
    evaluate_loss(ckpt, str(tmp_path / "one"), draws=1, accelerator="cpu")
    assert "Whether labels matter cannot be told" in capsys.readouterr().out
    alone = losses()
    alone.wrong = None
    assert findings(alone, GOOD) == []


def test_a_curve_that_cannot_be_written_is_shown(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ditlit.commands.evaluate_loss.write_atomically", disk_that_fails)
    with pytest.raises(InputError, match=r"cannot write .*x.json: Read-only file system. The numbers are those shown"):
        evaluate_loss(str(trained / "x.ckpt"), str(trained / "data" / "val"), str(tmp_path / "x.json"), draws=1)
    assert "timesteps  " in capsys.readouterr().out
    with pytest.raises(InputError, match="is a folder; give a file with --out"):
        evaluate_loss("absent.ckpt", "absent", out=str(tmp_path))


def disk_that_fails(path, data):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def test_the_loss_does_not_depend_on_the_batch_size(trained):
    store = LatentStore(trained / "data" / "val")
    rows = torch.arange(30).repeat(2)
    a, b = (
        compute(checkpoints.load(trained / "x.ckpt"), None, store, rows, size, 0, torch.device("cpu"))
        for size in (60, 7)
    )
    np.testing.assert_allclose(a[0].right, b[0].right, rtol=1e-4)
    np.testing.assert_array_equal(a[0].t, b[0].t)
    assert a[1].std == pytest.approx(b[1].std, rel=1e-6)
    assert a[1].std == pytest.approx(store.gather(rows)["latents"].float().std(unbiased=False).item(), rel=1e-4)


def test_an_average_that_stays_where_it_began_is_seen(trained):
    moved, raw = checkpoints.load(trained / "x.ckpt"), checkpoints.load(trained / "x.ckpt", "raw")
    found = compare_weights(moved, raw)
    assert 0 < found.distance < 0.5 and found.learned > 0.5 and found.step == 120
    for parameter in (still := checkpoints.load(trained / "x.ckpt")).denoiser.parameters():
        parameter.data.zero_()
    assert compare_weights(still, raw).learned == 0
    assert compare_weights(raw, raw).distance == 0


def test_the_digits_recipe_has_a_reference_curve():
    denoiser = DiT(input_size=8, in_channels=1, num_classes=10, patch_size=2, hidden_size=128, depth=6, num_heads=4)
    reference = reference_for(checkpoints.describe(denoiser), checkpoints.describe(GaussianDiffusion(clip_x0=True)))
    assert reference["recipe"] == "digits.yaml" and len(reference["mse"]) == len(reference["edges"]) - 1
    with torch.device("meta"):
        other = DiT("DiT-S/2")
    assert reference_for(checkpoints.describe(other), checkpoints.describe(GaussianDiffusion())) is None


def test_stores_that_do_not_fit_are_refused(trained, tmp_path):
    write_store(tmp_path / "a", torch.zeros(4, 4, 8, 8), torch.arange(4), 10, vae={"source": "x"})
    with pytest.raises(InputError, match=r"holds latents of shape \(4, 8, 8\), .* is built for \(1, 8, 8\)"):
        evaluate_loss(str(trained / "x.ckpt"), str(tmp_path / "a"), accelerator="cpu")
    write_store(tmp_path / "b", torch.zeros(4, 1, 8, 8), torch.arange(4), 4)
    with pytest.raises(InputError, match=r"has 4 classes, .*x.ckpt has 10, .*set --store_classes to the class of"):
        evaluate_loss(str(trained / "x.ckpt"), str(tmp_path / "b"), accelerator="cpu")
    with pytest.raises(InputError, match="draws must be positive, got"):
        evaluate_loss(str(trained / "x.ckpt"), str(tmp_path / "b"), draws=0)
