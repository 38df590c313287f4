"""Metrics in training: logged and monitored, and without a trace in weights and checkpoints."""

import errno
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from extractor import Colours
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ditlit.callbacks import SampleMetrics
from ditlit.callbacks.pictures import draw_images
from ditlit.diffusion.noise import mix
from ditlit.errors import InputError
from ditlit.evaluation import frechet_distance
from ditlit.evaluation.extraction import features_of
from ditlit.evaluation.statistics import statistics_of

NAME = "eval/Frechet_distance_Colours"


@pytest.fixture
def real(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "real.npz", arr_0=images)
    return str(tmp_path / "real.npz")


@pytest.fixture
def make_callback(real, tmp_path):
    def make(**changes):
        settings = dict(num_samples=12, num_test_samples=16, extractor="extractor.Colours", num_workers=0)
        settings |= dict(reference=real, cache=str(tmp_path / "cache"))
        return SampleMetrics(**(settings | changes))

    return make


def test_the_metric_is_that_of_samples_of_the_average_against_the_reference(
    make_module, make_trainer, make_callback, datamodule, tmp_path, real
):
    module, callback = make_module(), make_callback(every_n_steps=2)
    trainer = make_trainer(callbacks=[callback])
    trainer.fit(module, datamodule)
    labels = torch.arange(12) % 5
    drawn = draw_images(trainer, module, labels, callback._autoencoder.decode, mix(0, 0), 32)
    features = features_of(drawn, Colours(), ("pool",))["pool"]
    images = torch.from_numpy(np.load(real)["arr_0"]).permute(0, 3, 1, 2)
    expected = frechet_distance(
        statistics_of(features), statistics_of(features_of(images, Colours(), ("pool",))["pool"])
    )
    reports = sorted((tmp_path / "evaluations").iterdir())
    assert [path.name for path in reports] == ["step-00000002.json", "step-00000004.json"]
    last = json.loads(reports[-1].read_text())
    assert last["metrics"]["Frechet distance (Colours)"] == pytest.approx(expected, rel=1e-5)
    assert trainer.callback_metrics[NAME].item() == pytest.approx(expected, rel=1e-5)
    job = last["generated"]["job"]
    assert (job["step"], job["weights"], job["sampling"]["num_steps"], job["labels"]) == (4, "ema", 3, "balanced")


def test_weights_and_checkpoints_are_the_same_with_and_without_it(
    make_module, make_trainer, make_callback, datamodule, tmp_path
):
    saved = []
    for callbacks in ([], [make_callback(every_n_steps=1)]):
        trainer = make_trainer(callbacks=callbacks)
        trainer.fit(make_module(), datamodule)
        trainer.save_checkpoint(tmp_path / "x.ckpt")
        saved.append(torch.load(tmp_path / "x.ckpt", weights_only=False))
    plain, measured = saved
    assert plain["state_dict"].keys() == measured["state_dict"].keys()
    for key in ("state_dict", "current_model_state"):
        for name, value in plain[key].items():
            assert torch.equal(value, measured[key][name]), name
    assert not any("SampleMetrics" in name for name in measured["callbacks"])


def test_a_model_checkpoint_keeps_the_best_by_it_and_loggers_get_it_at_its_step(
    make_module, make_trainer, make_callback, datamodule, tmp_path
):
    best = ModelCheckpoint(tmp_path / "best", monitor=NAME, mode="min", every_n_train_steps=1, filename="{step}")
    logger = TensorBoardLogger(tmp_path, version="v")
    trainer = make_trainer(
        callbacks=[make_callback(every_n_steps=1), best], enable_checkpointing=True, logger=logger, log_every_n_steps=50
    )
    trainer.fit(make_module(), datamodule)
    reports = sorted(tmp_path.glob("evaluations/*.json"))
    values = [json.loads(path.read_text())["metrics"]["Frechet distance (Colours)"] for path in reports]
    assert len(values) == 4 and best.best_model_score.item() == pytest.approx(min(values), rel=1e-5)
    assert f"step={1 + int(np.argmin(values))}" in best.best_model_path
    events = EventAccumulator(logger.log_dir).Reload().Scalars(NAME)
    assert [event.step for event in events] == [1, 2, 3, 4]
    assert [event.value for event in events] == pytest.approx(values, rel=1e-5)


def test_validation_and_test_evaluate_too(make_module, make_trainer, make_callback, datamodule, tmp_path):
    module = make_module()
    trainer = make_trainer(callbacks=[make_callback()], val_check_interval=4)
    trainer.fit(module, datamodule)
    assert NAME in trainer.callback_metrics
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    during = json.loads((tmp_path / "evaluations" / "step-00000004.json").read_text())
    tester = make_trainer(callbacks=[make_callback(num_test_samples=12)])
    tester.test(make_module(), datamodule, ckpt_path=str(tmp_path / "x.ckpt"), weights_only=False)
    report = json.loads((tmp_path / "evaluations" / "test-00000004.json").read_text())
    assert report["metrics"] == pytest.approx(during["metrics"], rel=1e-4)  # from the average in the checkpoint
    assert report["generated"]["job"]["checkpoint"] == during["generated"]["job"]["checkpoint"]
    assert tester.callback_metrics[NAME].item() == pytest.approx(report["metrics"]["Frechet distance (Colours)"])


def test_two_processes_measure_what_one_does(
    make_module, make_trainer, make_callback, datamodule, tmp_path, real, store
):
    trainer = make_trainer(callbacks=[make_callback(every_n_steps=4)])
    trainer.fit(make_module(), datamodule)
    one = json.loads((tmp_path / "evaluations" / "step-00000004.json").read_text())
    script = tmp_path / "run.py"
    script.write_text(f"""
import torch
from lightning.pytorch import Trainer
from ditlit.data import LatentDataModule
from ditlit.diffusion import Sampling
from ditlit.models import DiT
from ditlit.callbacks import SampleMetrics
from ditlit.training import EMA, DiTModule
torch.manual_seed(0)
denoiser = DiT(input_size=8, in_channels=3, num_classes=5, patch_size=4, hidden_size=16, depth=2, num_heads=2)
module = DiTModule(denoiser, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2), ema=EMA(0.9),
                   sampling=Sampling(num_steps=3))
metrics = SampleMetrics({real!r}, 4, 12, extractor="extractor.Colours", num_workers=0, cache="cache2")
trainer = Trainer(accelerator="cpu", devices=2, max_steps=4, logger=False, enable_checkpointing=False,
                  enable_progress_bar=False, num_sanity_val_steps=0, val_check_interval=1000,
                  check_val_every_n_epoch=None, callbacks=[metrics], default_root_dir="two")
trainer.fit(module, LatentDataModule({store!r}, val_size=10, global_batch_size=8, val_batch_size=4))
""")
    result = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    two = json.loads((tmp_path / "two" / "evaluations" / "step-00000004.json").read_text())
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-3)  # weights differ by rounding


def test_bad_settings_stop_a_run_before_its_first_step(make_module, make_trainer, make_callback, datamodule, tmp_path):
    with pytest.raises(InputError, match="every_n_steps must be positive"):
        make_callback(every_n_steps=0)
    with pytest.raises(InputError, match="need at least 4 samples"):
        make_callback(num_samples=3)
    with pytest.raises(InputError, match="there is nothing at"):
        make_trainer(callbacks=[make_callback(reference=str(tmp_path / "absent"))]).fit(make_module(), datamodule)


def test_a_report_that_cannot_be_written_costs_a_warning_with_its_numbers(
    make_module, make_trainer, make_callback, datamodule, tmp_path, monkeypatch
):
    def fails(report, path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("ditlit.callbacks.evaluation.write_report", fails)
    trainer = make_trainer(callbacks=[make_callback(every_n_steps=4)])
    message = (
        r"cannot write .*step-00000004.json \(No space left on device\). At step 4: Frechet distance \(Colours\) \d"
    )
    with pytest.warns(match=message):
        trainer.fit(make_module(), datamodule)
    assert trainer.global_step == 4 and NAME in trainer.callback_metrics
    monkeypatch.undo()
    (tmp_path / "evaluations").rmdir()
    (tmp_path / "evaluations").touch()
    with pytest.raises(InputError, match=r"cannot write to .*evaluations: .*with --trainer.default_root_dir"):
        make_trainer(callbacks=[make_callback()]).fit(make_module(), datamodule)
