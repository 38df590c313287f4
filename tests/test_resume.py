"""A run killed at any step and continued is the run that was never killed, bit for bit, on one process and on two."""

import contextlib
import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger


def start(folder: Path, store: str, devices: int, resume: bool = False, **kill) -> subprocess.Popen:
    """Start the command line in a process group of its own. ``kill`` goes to RecordLosses."""
    folder.mkdir(exist_ok=True)
    config = {
        "model": {
            "denoiser": {
                "class_path": "ditlit.models.DiT",
                "init_args": dict(
                    input_size=8, in_channels=3, num_classes=5, patch_size=4, hidden_size=16, depth=2, num_heads=2,
                    dropout=0.1, positions="learned",
                ),
            },
            "lr_scheduler": {"class_path": "torch.optim.lr_scheduler.LinearLR", "init_args": {"total_iters": 20}},
            "ema": {"class_path": "ditlit.training.EMA", "init_args": {"decay": 0.9, "warmup": True}},
        },
        "data": {
            "class_path": "ditlit.data.LatentDataModule",
            # 30 training samples: epochs of 3 steps, so that steps 3k + 1 and 3k + 2 lie within an epoch.
            "init_args": dict(store=store, val_size=10, global_batch_size=8),
        },
        "trainer": {
            "accelerator": "cpu",
            "devices": devices,
            "strategy": "ddp" if devices > 1 else "auto",
            "default_root_dir": str(folder),
            "max_steps": 14,
            "max_epochs": -1,
            "accumulate_grad_batches": 2,
            "gradient_clip_val": 0.5,
            "log_every_n_steps": 1,
            "check_val_every_n_epoch": None,
            "val_check_interval": 4,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [
                {"class_path": "losses.RecordLosses", "init_args": {"folder": str(folder)} | kill},
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": dict(filename="last", every_n_train_steps=4, enable_version_counter=False),
                },
            ],
        },
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "ditlit", "fit", "--config", str(folder / "run.yaml")]
    command += ["--ckpt_path", "last"] if resume else []
    with open(folder / "log.txt", "a") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def fit(folder: Path, store: str, devices: int, resume: bool = False, **kill) -> int:
    """Run the command line to its end; returns the exit status."""
    process = start(folder, store, devices, resume, **kill)
    try:
        return process.wait(timeout=120)
    finally:
        if process.poll() is None or process.returncode < 0:  # the other ranks too
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def losses(folder: Path) -> dict[str, list[str]]:
    return {path.name: path.read_text().splitlines() for path in sorted(folder.glob("rank*.txt"))}


def assert_same(a, b, where="checkpoint"):
    """Equal trees of plain values and tensors, bit for bit."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}.{i}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


@pytest.mark.parametrize(("devices", "kill_at"), [(1, 7), (2, 11)])
def test_killed_and_continued(tmp_path, store, devices, kill_at):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert fit(whole, store, devices) == 0, (whole / "log.txt").read_text()
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


def test_one_rank_is_told_to_stop_and_the_newest_checkpoint_is_damaged(tmp_path, store):
    """All ranks stop together; ``last`` passes over the damaged file and the run ends as if it had never stopped."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert fit(whole, store, 2) == 0, (whole / "log.txt").read_text()
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
