"""A signal ends a run in good order: the step is finished, last.ckpt written, and the run can be continued."""

import os
import signal
import stat
import time

import pytest
import ranks
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from ditlit.data import LatentDataModule
from ditlit.errors import InputError
from ditlit.resilience import CheckpointFiles, Interrupted, StopOnSignal
from ditlit.resilience.checkpoint_files import step_of, write
from ditlit.resilience.interruption import requeue

STEPS = 6


class SignalAt(Callback):
    """Sends this process a signal while the micro-batch after ``step`` optimizer steps is computed."""

    def __init__(self, signum, step, micro_batch=0):
        self.signum, self.at = signum, (step, micro_batch)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (trainer.global_step, batch_idx % trainer.accumulate_grad_batches) == self.at:
            os.kill(os.getpid(), self.signum)


@pytest.fixture
def fit(make_module, make_trainer, store, tmp_path):
    def run(folder, *callbacks, ckpt_path=None, files=None, **changes):
        trainer = make_trainer(
            default_root_dir=tmp_path / folder, max_steps=STEPS, accumulate_grad_batches=2, max_epochs=-1,
            plugins=[files or CheckpointFiles()], callbacks=[StopOnSignal(), *callbacks], **changes,
        )  # fmt: skip
        module = make_module()
        data = LatentDataModule(store, val_size=10, global_batch_size=8, val_batch_size=4)
        trainer.fit(module, data, ckpt_path=ckpt_path)
        return module

    return run


@pytest.mark.parametrize(("name", "micro_batch"), [("SIGTERM", 0), ("SIGUSR1", 1), ("SIGINT", 0)])
def test_the_step_is_finished_saved_and_continued(fit, tmp_path, monkeypatch, name, micro_batch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    signum = getattr(signal, name)
    whole = fit("whole").state_dict()
    handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    with pytest.raises(
        Interrupted, match=f"stopped by {name} after step 4; saved .*last.ckpt.*--ckpt_path last"
    ) as stop:
        fit("broken", SignalAt(signum, 3, micro_batch))
    assert stop.value.signum == signum
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == handlers
    path = tmp_path / "broken/checkpoints/last.ckpt"
    assert torch.load(path)["global_step"] == 4
    continued = fit("broken", ckpt_path=path).state_dict()
    assert all(torch.equal(value, continued[key]) for key, value in whole.items())


def test_what_is_written_in_the_background_is_waited_for(fit, tmp_path, monkeypatch):
    def slow(checkpoint, path):
        time.sleep(0.2)
        write(checkpoint, path)

    monkeypatch.setattr("ditlit.resilience.checkpoint_files.write", slow)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    save = ModelCheckpoint(filename="{step}", every_n_train_steps=3)
    with pytest.raises(Interrupted, match=r"after step 4; saved .*last.ckpt"):
        fit("broken", save, SignalAt(signal.SIGTERM, 3), files=CheckpointFiles(True), enable_checkpointing=True)
    folder = tmp_path / "broken/checkpoints"
    assert [step_of(folder / name) for name in ("step=3.ckpt", "last.ckpt")] == [3, 4]


def test_handlers_are_put_back_when_a_run_ends(fit):
    before = signal.getsignal(signal.SIGINT)
    fit("whole")
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_interrupt_is_not_waited_for(make_trainer, monkeypatch):
    callback = StopOnSignal()
    callback._listen(make_trainer())
    ended = []
    monkeypatch.setattr(signal, "raise_signal", ended.append)
    original = callback._handlers[signal.SIGINT]
    try:
        for _ in range(2):  # the terminal's, and at once again the launcher's
            os.kill(os.getpid(), signal.SIGINT)
        assert callback._received == signal.SIGINT and not ended
        callback._received_at -= 2
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        assert ended == [signal.SIGINT] and signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    finally:
        callback._restore_handlers()
    assert signal.getsignal(signal.SIGINT) is original


def test_a_slurm_job_is_requeued(fit, tmp_path, monkeypatch):
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f"#!/bin/sh\necho $@ >> {tmp_path}/called\n")
    scontrol.chmod(scontrol.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with pytest.raises(Interrupted, match="SLURM job 7 is back in the queue and continues by itself"):
        fit("job", SignalAt(signal.SIGUSR1, 1))
    with pytest.raises(Interrupted, match="--ckpt_path last"):  # a job that is to end is not
        fit("job", SignalAt(signal.SIGTERM, 1))
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "8")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert "job 8_3 is back" in requeue()
    assert (tmp_path / "called").read_text().split("\n") == ["requeue 7", "requeue 8_3", ""]
    scontrol.write_text("#!/bin/sh\necho Access denied >&2; exit 1\n")
    assert requeue() == "SLURM did not requeue job 8_3 (Access denied); submit it again with --ckpt_path last"


def fit_with_workers(store, folder, **signal_job):
    stop = {"class_path": "ranks.SignalJob", "init_args": dict(step=2, **signal_job)}
    config = ranks.write_config(folder, store, "auto", callbacks=[stop])
    status = ranks.run(1, ["fit", "--config", str(config), "--data.num_workers", "2"], folder)
    return status[0], (folder / "log.txt").read_text()


def test_a_signal_to_all_processes_of_a_job_leaves_the_workers_to_their_parent(store, tmp_path):
    status, log = fit_with_workers(store, tmp_path, name="TERM", itself=True)
    assert status == 128 + signal.SIGTERM and "stopped by SIGTERM after step 2; saved" in log, log
    assert torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=False)["global_step"] == 2


def test_a_worker_that_is_killed_for_memory_ends_training_with_the_remedy(store, tmp_path):
    status, log = fit_with_workers(store, tmp_path, name="KILL", itself=False)
    assert status == 2 and "Traceback" not in log, log
    assert "error: a process that reads ahead was killed, most likely because the memory ran out: lower" in log


def test_a_requeued_job_continues_and_any_other_new_run_is_refused(command, tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    assert command("fit")["ckpt_path"] is None
    last = tmp_path / "checkpoints" / "last.ckpt"
    write({"global_step": 3}, last)
    with pytest.raises(InputError, match="holds a run already"):
        command("fit")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert command("fit")["ckpt_path"] == str(last)


def test_last_is_the_newest_whole_checkpoint_for_every_command(command, tmp_path):
    assert command("fit", "--ckpt_path", "last")["ckpt_path"] is None  # so that one job script starts and continues
    with pytest.raises(InputError, match=r"there is no checkpoint in .*checkpoints; give one with --ckpt_path"):
        command("validate", "--ckpt_path", "last")
    for step in (3, 4):
        write({"global_step": step}, tmp_path / "checkpoints" / "last.ckpt")
    previous = tmp_path / "checkpoints" / "last-previous.ckpt"
    os.truncate(tmp_path / "checkpoints" / "last.ckpt", 100)
    for subcommand in ("fit", "validate", "test", "predict"):
        assert command(subcommand, "--ckpt_path", "last")["ckpt_path"] == str(previous)
    assert command("validate", "--ckpt_path", "other.ckpt")["ckpt_path"] == "other.ckpt"
