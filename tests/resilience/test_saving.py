"""When a run writes checkpoints: where every fit ends, so that it can be prolonged, and every so often."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from runs import assert_same

from ditlit.errors import InputError
from ditlit.resilience import CheckpointFiles
from ditlit.resilience.checkpoint_files import step_of, write
from ditlit.resilience.saving import KeptCheckpoints, LastCheckpoint, with_checkpoints


class StopAfter(Callback):
    """Ends training after some micro-batches of the whole run, as max_time does."""

    def __init__(self, batches):
        self.batches = batches

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches -= 1
        trainer.should_stop |= self.batches == 0


@pytest.fixture
def fit(make_module, make_trainer, datamodule, tmp_path):
    """Trains in epochs of 3 steps, each of 2 micro-batches; returns the folder of the checkpoints."""

    def run(folder, *callbacks, files=None, ckpt_path=None, **changes):
        changes = dict(max_epochs=-1, accumulate_grad_batches=2, val_check_interval=4) | changes
        trainer = make_trainer(
            default_root_dir=tmp_path / folder, plugins=[files or CheckpointFiles()], callbacks=list(callbacks),
            enable_checkpointing=True, **changes,
        )  # fmt: skip
        trainer.fit(make_module(), datamodule, ckpt_path=ckpt_path)
        return tmp_path / folder / "checkpoints"

    return run


ENDS = {
    "max_steps within an epoch": (4, dict(max_steps=4), None, False),
    "max_steps at the end of an epoch": (3, dict(max_steps=3), None, True),
    "max_epochs": (3, dict(max_steps=-1, max_epochs=1), None, False),
    "amid the batches of a step": (4, dict(max_steps=-1), lambda: StopAfter(9), True),
    "early stopping": (2, dict(max_steps=-1), lambda: EarlyStopping("val/loss", stopping_threshold=1e9), False),
}


@pytest.mark.parametrize(("step", "end", "stop", "background"), ENDS.values(), ids=ENDS.keys())
def test_however_a_fit_ends_its_last_step_is_saved_once_and_can_be_gone_on_from(
    fit, monkeypatch, step, end, stop, background
):
    written = []
    monkeypatch.setattr(
        "ditlit.resilience.checkpoint_files.write",
        lambda content, path: (written.append((path.name, content["global_step"])), write(content, path)),
    )
    files = CheckpointFiles(background)
    folder = fit("broken", *([stop()] if stop else []), LastCheckpoint(), files=files, **end)
    assert written == [("last.ckpt", step)] and step_of(folder / "last.ckpt") == step
    # Prolonged, it is the run that had not ended: weights, optimizer, and where in which epoch it stands.
    whole = fit("whole", LastCheckpoint(), max_steps=8)
    fit("broken", LastCheckpoint(), max_steps=8, ckpt_path=folder / "last.ckpt")
    whole, prolonged = (torch.load(path / "last.ckpt") for path in (whole, folder))
    for key in ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "global_step"):
        assert_same(prolonged[key], whole[key], key)
    for counter, done in (("epoch_progress", 2), ("epoch_loop.batch_progress", 4)):
        counts = [content["loops"]["fit_loop"][counter]["current"]["processed"] for content in (whole, prolonged)]
        assert counts[0] == counts[1] == done


def test_what_is_there_under_this_name_is_not_saved_again(fit, tmp_path):
    folder = fit("every", LastCheckpoint(every=2))
    assert [step_of(folder / name) for name in ("last.ckpt", "last-previous.ckpt")] == [4, 2]
    own = dict(filename="last", every_n_train_steps=1, enable_version_counter=False)
    folder = fit("own", ModelCheckpoint(**own), LastCheckpoint(every=2))
    assert [step_of(folder / name) for name in ("last.ckpt", "last-previous.ckpt")] == [4, 3]
    folder = fit("link", ModelCheckpoint(filename="{step}", every_n_train_steps=2, save_last="link"), LastCheckpoint())
    assert (folder / "last.ckpt").is_symlink() and not (folder / "last-previous.ckpt").exists()
    folder = fit("name", ModelCheckpoint(filename="{step}", every_n_train_steps=2), LastCheckpoint())
    assert [step_of(folder / name) for name in ("last.ckpt", "step=4.ckpt")] == [4, 4]
    before = (folder / "last.ckpt").stat().st_mtime_ns
    fit("name", LastCheckpoint(), ckpt_path=folder / "last.ckpt")  # no step is left to do
    assert (folder / "last.ckpt").stat().st_mtime_ns == before


def test_nothing_is_saved_by_a_fast_dev_run(fit):
    assert not fit("fast", LastCheckpoint(every=1), fast_dev_run=2).exists()


def test_a_save_of_the_last_step_that_failed_is_tried_again(fit, monkeypatch):
    attempts = []

    def full_at_first(content, path):
        attempts.append(content["global_step"])
        if len(attempts) == 1:
            raise OSError(28, "No space left on device")
        write(content, path)

    monkeypatch.setattr("ditlit.resilience.checkpoint_files.write", full_at_first)
    with pytest.warns(UserWarning, match="could not save step 4"):
        folder = fit("full", LastCheckpoint(every=4))
    assert attempts == [4, 4] and step_of(folder / "last.ckpt") == 4


def test_periods_are_those_asked_for_and_may_change(fit):
    folder = fit("run", KeptCheckpoints(2), LastCheckpoint(every=3), max_steps=5)
    kept = sorted(path.name for path in folder.iterdir())
    assert kept == ["last-previous.ckpt", "last.ckpt", "step=00000002.ckpt", "step=00000004.ckpt"]
    assert step_of(folder / "last-previous.ckpt") == 3
    fit("run", KeptCheckpoints(1), LastCheckpoint(every=1), max_steps=6, ckpt_path=folder / "last.ckpt")
    assert step_of(folder / "step=00000006.ckpt") == 6 and not (folder / "step=00000005.ckpt").exists()
    for make, name in ((LastCheckpoint, "save_every"), (KeptCheckpoints, "keep_every")):
        with pytest.raises(InputError, match=f"{name} must be positive, got 0"):
            make(0)


def test_a_run_s_checkpoints_are_those_asked_for_or_lightning_s_default(tmp_path):
    def kinds(*args):
        return [type(callback).__name__ for callback in with_checkpoints(*args)]

    assert kinds(None, None, None) == ["ModelCheckpoint", "LastCheckpoint"]
    assert kinds(None, 5, None) == ["LastCheckpoint"]
    assert kinds([Callback()], 5, 5) == ["Callback", "KeptCheckpoints", "LastCheckpoint"]
    own = ModelCheckpoint(tmp_path, filename="last", every_n_train_steps=7)
    given, last = with_checkpoints(own, None, None)
    assert given is own and last.dirpath == own.dirpath  # the newest state has one place
    best = ModelCheckpoint(tmp_path, monitor="val/loss")
    assert with_checkpoints([best], 5, None)[-1].dirpath is None
