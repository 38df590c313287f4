"""A run killed at any step and continued is the run that was never killed, bit for bit, on one process and on two."""

import csv
import functools
import os
import signal
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from runs import assert_same, fit, losses


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, store):
    """The folder of a run on so many devices that nothing happens to."""

    @functools.cache
    def run(devices):
        folder = tmp_path_factory.mktemp("undisturbed")
        assert fit(folder, store, devices) == 0, (folder / "log.txt").read_text()
        return folder

    return run


@pytest.mark.parametrize(("devices", "kill_at"), [(1, 7), (2, 11)])
def test_killed_and_continued(tmp_path, store, undisturbed, devices, kill_at):
    whole, broken = undisturbed(devices), tmp_path / "broken"
    assert fit(broken, store, devices, kill_at=kill_at) != 0
    before = losses(broken)
    assert {len(lines) for lines in before.values()} == {2 * kill_at} and len(before) == devices
    for path in broken.glob("rank*.txt"):
        path.unlink()
    assert fit(broken, store, devices, resume=True) == 0, (broken / "log.txt").read_text()

    resumed_from = kill_at // 4 * 4
    after, reference = losses(broken), losses(whole)
    assert len(reference) == devices and all(len(lines) == 28 for lines in reference.values())
    for rank, lines in reference.items():
        assert before[rank] == lines[: 2 * kill_at]
        assert after[rank] == lines[2 * resumed_from :]
    checkpoints = [torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True) for folder in (whole, broken)]
    assert checkpoints[0]["global_step"] == 14
    for key in ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers"):
        assert_same(checkpoints[0][key], checkpoints[1][key], key)


def test_one_rank_is_told_to_stop_and_the_newest_checkpoint_is_damaged(tmp_path, store, undisturbed):
    """All ranks stop together; ``last`` passes over the damaged file and the run ends as if it had never stopped."""
    whole, broken = undisturbed(2), tmp_path / "broken"
    status = fit(broken, store, 2, kill_at=9, kill_rank=1, signum=int(signal.SIGTERM))
    log = (broken / "log.txt").read_text()
    assert status == 128 + signal.SIGTERM, log
    last = broken / "checkpoints" / "last.ckpt"
    steps = {len(lines) // 2 for lines in losses(broken).values()}
    assert len(steps) == 1 and steps <= {9, 10, 11}  # both ranks, and soon
    saved = f"ditlit: stopped by SIGTERM after step {steps.pop()}; saved {last}. Continue with the same command and "
    assert log.count(saved + "--ckpt_path last") == 1 and "Traceback" not in log
    os.truncate(last, last.stat().st_size - 1000)
    assert fit(broken, store, 2, resume=True) == 0, (broken / "log.txt").read_text()
    log = (broken / "log.txt").read_text()
    assert f"{last} is damaged and passed over" in log and Path(f"{last}.damaged").is_file()
    assert f"Continuing from {last.with_name('last-previous.ckpt')}, step 8, the newest whole checkpoint" in log
    checkpoints = [torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True) for folder in (whole, broken)]
    assert checkpoints[0]["global_step"] == checkpoints[1]["global_step"] == 14
    for key in ("state_dict", "current_model_state"):
        assert all(torch.equal(value, checkpoints[1][key][name]) for name, value in checkpoints[0][key].items())


class SaveAt(Callback):
    """Saves after some micro-batches of the whole run, counted from 1."""

    def __init__(self, folder: Path, *batches: int):
        self.folder, self.batches, self.seen = folder, batches, 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen += 1
        if self.seen in self.batches:
            trainer.save_checkpoint(self.folder / f"batch={self.seen}.ckpt")


@pytest.fixture
def run(make_module, make_trainer, datamodule, tmp_path):
    """Trains for 8 steps, epochs of 3, with a held-out loss after each fourth; its logs and final checkpoint."""

    def train(accumulate, *callbacks, ckpt_path=None):
        logger = CSVLogger(tmp_path, name="logs")
        trainer = make_trainer(
            max_steps=8, max_epochs=-1, accumulate_grad_batches=accumulate, val_check_interval=4 * accumulate,
            callbacks=list(callbacks), enable_checkpointing=True, logger=logger,
        )  # fmt: skip
        trainer.fit(make_module(), datamodule, ckpt_path=ckpt_path)
        path = tmp_path / "end.ckpt"
        trainer.save_checkpoint(path)
        with open(Path(logger.log_dir) / "metrics.csv") as file:
            logged = {int(row["step"]): row["val/loss"] for row in csv.DictReader(file) if row["val/loss"]}
        return torch.load(path), logged

    return train


def test_a_step_begins_anew_where_a_checkpoint_was_written_amid_its_batches(run, tmp_path):
    whole, logged = run(2, SaveAt(tmp_path, 5, 7, 13))  # in the third step; the first of an epoch; the seventh
    for batch in (5, 7, 13):
        continued, logged_later = run(2, ckpt_path=tmp_path / f"batch={batch}.ckpt")
        for key in ("state_dict", "current_model_state", "optimizer_states", "averaging_state", "global_step"):
            assert_same(continued[key], whole[key], key)
        assert logged_later == {step: loss for step, loss in logged.items() if step >= (batch - 1) // 2}


@pytest.mark.parametrize(("before", "after", "batch"), [(1, 2, 2), (2, 1, 4), (2, 4, 5), (4, 1, 12)])
def test_batches_may_be_accumulated_otherwise(run, tmp_path, before, after, batch):
    whole, logged = run(before, SaveAt(tmp_path, batch))
    continued, logged_later = run(after, ckpt_path=tmp_path / f"batch={batch}.ckpt")
    assert continued["global_step"] == 8 and logged_later.keys() == logged.keys()
    for name, value in whole["current_model_state"].items():
        torch.testing.assert_close(continued["current_model_state"][name], value, rtol=1e-3, atol=1e-4)


def test_a_continued_run_does_not_save_what_it_has_loaded(run, tmp_path):
    save = dict(dirpath=tmp_path / "kept", filename="{step}", every_n_train_steps=3, save_top_k=-1)
    run(2, ModelCheckpoint(**save))
    path = tmp_path / "kept" / "step=3.ckpt"
    written = path.stat().st_mtime_ns
    run(2, ModelCheckpoint(**save), ckpt_path=path)
    assert path.stat().st_mtime_ns == written
