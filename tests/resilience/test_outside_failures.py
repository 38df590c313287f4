"""Curves, folders and stores that fail a run: one line each, and no more than that."""

import shutil
import subprocess
import sys

import pytest
import torch
from lightning.pytorch import Callback
from torch._utils import ExceptionWrapper

from ditlit import training
from ditlit.cli import format_warning, own_words
from ditlit.commands import call
from ditlit.data import LatentDataModule
from ditlit.data.folders import check_writable
from ditlit.errors import InputError


def test_curves_that_cannot_be_written_end_with_one_line(tmp_path):
    """A limit on the size of files stands for the full disk."""
    script = f"""
import resource, signal, torch
from ditlit.callbacks.curves import RunLogger
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
logger = RunLogger({str(tmp_path)!r}, name="", version="")
logger.log_metrics({{"loss": 1.0}}, 0)
logger.experiment.flush()
resource.setrlimit(resource.RLIMIT_FSIZE, (200, resource.RLIM_INFINITY))
for step in range(1, 200):
    logger.log_metrics({{"loss": 1.0}}, step)
    logger.experiment.add_image("samples", torch.zeros(3, 8, 8), step)
    if step % 50 == 0:
        logger.experiment.flush()
logger.experiment.flush()
logger.experiment.close()
print("trained")
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
    assert result.returncode == 0 and "trained" in result.stdout, result.stderr
    assert result.stderr.count("cannot be written (File too large): they end here, and training goes on") == 1
    assert "Traceback" not in result.stderr


def test_a_folder_that_cannot_be_written_is_refused_before_any_work(tmp_path):
    check_writable(tmp_path / "runs" / "new", "--out")
    assert not list((tmp_path / "runs" / "new").iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write to .*file: File exists; choose another place with --out$"):
        check_writable(tmp_path / "file", "--out")
    with pytest.raises(InputError, match=r"cannot write to .*below: Not a directory"):
        check_writable(tmp_path / "file" / "below", "--out")


@pytest.mark.parametrize(
    "command, words, setting",
    [
        ("convert", dict(source="a.ckpt", out="file/b.pt"), "--out"),
        ("evaluate", dict(generated="a", reference="b", out="file/report.json"), "--out"),
        ("evaluate", dict(reference="b", save_stats="file/b.npz"), "--save_stats"),
        ("evaluate loss", dict(ckpt="a.ckpt", store="b", out="file/loss.json"), "--out"),
        ("evaluate sweep", dict(ckpt="a.ckpt", reference="b", out="file/sweep"), "--out"),
    ],
)
def test_commands_refuse_a_place_for_results_before_they_work(tmp_path, monkeypatch, command, words, setting):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=rf"cannot write to file.*; choose another place with {setting}$"):
        call(command, **words)


def test_errors_of_processes_that_read_ahead_are_one_line():
    try:
        raise InputError("data/store/shard-00001.safetensors is missing; copy or encode this shard again")
    except InputError:
        caught = ExceptionWrapper(where="in DataLoader worker process 0")
    with pytest.raises(InputError, match="Original Traceback") as raised:
        caught.reraise()
    expected = "data/store/shard-00001.safetensors is missing; copy or encode this shard again"
    assert own_words(raised.value) == own_words(InputError(expected)) == expected


def test_warnings_of_ditlit_are_one_line_and_others_untouched():
    assert (
        format_warning("the disk is full", UserWarning, training.__file__, 3) == "ditlit: warning: the disk is full\n"
    )
    others = format_warning("old", UserWarning, pytest.__file__, 3)
    assert others.startswith(pytest.__file__) and "old" in others


def test_a_store_that_is_removed_amid_training_is_not_missed(make_module, make_trainer, store, tmp_path):
    """Its files are mapped; only a continued run needs them back."""

    class Remove(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 1:
                shutil.rmtree(tmp_path / "store")

    def weights(location, *callbacks):
        module, data = make_module(), LatentDataModule(str(location), global_batch_size=8)
        make_trainer(callbacks=list(callbacks), max_steps=6).fit(module, data)
        return module.state_dict()

    shutil.copytree(store, tmp_path / "store")
    expected, found = weights(store), weights(tmp_path / "store", Remove())
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    with pytest.raises(InputError, match="there is no latent store at"):
        weights(tmp_path / "store")
