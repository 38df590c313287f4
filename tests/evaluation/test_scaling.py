"""Quality against compute: costs by their formulas, losses as they were logged, one row for each run."""

import csv
import json

import pytest
import yaml
from calls import evaluate_scaling
from PIL import Image

from ditlit.analysis.curves import read_curves
from ditlit.callbacks import TrainingMonitor
from ditlit.callbacks.curves import RunLogger
from ditlit.commands import evaluate_scaling as scaling
from ditlit.errors import InputError
from ditlit.models import macs


@pytest.fixture
def runs(make_module, make_trainer, datamodule, tmp_path):
    """Two runs of eight steps: the folder, and the values that their loggers were given."""
    logged = {}
    for name in ("a", "b"):
        run = tmp_path / "runs" / name
        logger = RunLogger(run, name="", version="")
        seen = logged[name] = {}
        write = logger.log_metrics

        def note(metrics, step=None, seen=seen, write=write):
            seen |= {(tag, step): value for tag, value in metrics.items()}
            write(metrics, step)

        logger.log_metrics = note
        trainer = make_trainer(logger=logger, max_steps=8, val_check_interval=4, log_every_n_steps=2,
                               callbacks=[TrainingMonitor()])  # fmt: skip
        trainer.fit(make_module(), datamodule)
        trainer.save_checkpoint(run / "checkpoints" / "last.ckpt")
        (run / "config.yaml").write_text(yaml.safe_dump({"data": {"init_args": {"global_batch_size": 8}}}))
        logger.experiment.flush()
    return tmp_path / "runs", logged


def test_curves_are_what_was_logged(runs):
    folder, logged = runs
    curves = read_curves(folder / "a")
    loss = curves["train/loss"]
    assert loss.steps == [2, 4, 6, 8]
    assert loss.values == pytest.approx([logged["a"]["train/loss", step] for step in loss.steps], rel=1e-6)
    with pytest.raises(InputError, match="no TensorBoard event files"):
        read_curves(folder)


def test_costs_follow_their_formulas(runs, make_module):
    folder, logged = runs
    cost = scaling.cost_of(folder / "a" / "checkpoints" / "last.ckpt")
    forward = macs(make_module().denoiser)
    assert cost["gmacs"] == forward / 1e9 and cost["step"] == 8
    assert cost["pflops"] == pytest.approx(2 * 3 * forward * 8 * 8 / 1e15)
    rates = [logged["a"]["throughput/images_per_second", step] for step in (2, 4, 6, 8)]
    assert cost["hours"] == pytest.approx(sum(16 / rate for rate in rates) / 3600, rel=1e-5)
    losses = read_curves(folder / "a")["val/loss"]
    assert cost["val_loss"] == losses.values[-1]
    assert [x for x, _ in cost["losses"]] == pytest.approx([cost["pflops"] * step / 8 for step in losses.steps])


def test_every_run_is_a_row_and_is_measured_once(runs, tmp_path, monkeypatch):
    folder, _ = runs
    drawn = []

    def run_point(sampled, settings, place, keep_images):
        drawn.append((place.name, sampled.ckpt, sampled.sampling.guidance_scale, settings.reference))
        return {"metrics": {"FID": 10.0 + len(drawn)}}

    monkeypatch.setattr(scaling, "run_point", run_point)
    out = tmp_path / "scaling"
    evaluate_scaling(str(folder), "store", str(out), metrics="fid")
    assert [(name, scale, reference) for name, _, scale, reference in drawn] == [
        ("a-00000008", 1.0, "store"), ("b-00000008", 1.0, "store"),
    ]  # fmt: skip
    with open(out / "table.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["model"], row["FID"]) for row in rows] == [("a", "11.0"), ("b", "12.0")]
    assert (out / "table.md").read_text().count("\n") == 4
    assert [row["model"] for row in json.loads((out / "scaling.json").read_text())] == ["a", "b"]
    assert Image.open(out / "scaling.png").width > 1000
    with pytest.raises(InputError, match="begun with other reference"):
        evaluate_scaling(str(folder), "other", str(out), metrics="fid")


def test_mistakes(runs, tmp_path):
    folder, _ = runs
    with pytest.raises(InputError, match="holds no runs"):
        evaluate_scaling(str(tmp_path / "none"), "store", str(tmp_path / "out"))
    (folder / "a" / "config.yaml").write_text("model: {}")
    with pytest.raises(InputError, match="does not say global_batch_size"):
        evaluate_scaling(str(folder), "store", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
