"""Checkpoints outlive crashes, damage and full disks, and no code in them is run."""

import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from runs import assert_same

from ditlit.errors import InputError
from ditlit.resilience import CheckpointFiles
from ditlit.resilience.checkpoint_files import is_intact, newest_complete, set_aside, step_of, write


def checkpoint(step, size=1000):
    return {"global_step": step, "state_dict": {"w": torch.full((size,), float(step))}}


def flip_a_byte(path, at=0.5):
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 0xFF
    path.write_bytes(data)


def truncate(path, share=0.7):
    os.truncate(path, int(path.stat().st_size * share))


def test_the_file_that_is_replaced_is_kept(tmp_path):
    path = tmp_path / "checkpoints" / "last.ckpt"
    for step in (1, 2, 3):
        CheckpointFiles().save_checkpoint(checkpoint(step), path)
    assert sorted(p.name for p in path.parent.iterdir()) == ["last-previous.ckpt", "last.ckpt"]
    assert torch.load(path)["global_step"] == 3
    assert torch.load(path.with_name("last-previous.ckpt"))["global_step"] == 2


@pytest.mark.parametrize("damage", [flip_a_byte, truncate, lambda path: path.write_bytes(b"")])
def test_the_newest_whole_checkpoint_is_found(tmp_path, damage):
    for step in (10, 20):
        write(checkpoint(step), tmp_path / "last.ckpt")
    write(checkpoint(8), tmp_path / "step=00000008.ckpt")  # written last, but not the newest
    assert newest_complete([tmp_path]) == (tmp_path / "last.ckpt", 20, [])
    damage(tmp_path / "last.ckpt")
    assert newest_complete([tmp_path]) == (tmp_path / "last-previous.ckpt", 10, [tmp_path / "last.ckpt"])
    damage(tmp_path / "last-previous.ckpt")
    path, step, damaged = newest_complete([tmp_path, tmp_path / "nowhere"])
    assert (path.name, step, len(damaged)) == ("step=00000008.ckpt", 8, 2)
    damage(path)
    with pytest.raises(InputError, match=r"no checkpoint of this run is whole \(.*last.ckpt.*start again"):
        newest_complete([tmp_path])
    assert newest_complete([tmp_path / "nowhere"]) is None


def test_a_damaged_checkpoint_never_takes_the_place_of_a_whole_one(tmp_path):
    """Damaged, continued from the one before, and damaged again before the second save since."""
    path = tmp_path / "last.ckpt"

    def save(step):
        write({"global_step": step, "weights": torch.arange(1000)}, path)

    save(10)
    save(20)
    for step in (13, 16):
        path.write_bytes(path.read_bytes()[:700])
        found, at, damaged = newest_complete([tmp_path])
        assert (found.name, at, damaged) == ("last-previous.ckpt", 10, [path])
        set_aside(damaged)
        assert path.with_name("last.ckpt.damaged").is_file()
        save(step)
    assert newest_complete([tmp_path]) == (path, 16, [])


def test_every_flipped_byte_of_the_weights_is_noticed(tmp_path):
    path = tmp_path / "last.ckpt"
    write(checkpoint(1), path)
    with zipfile.ZipFile(path) as file:
        record = next(info for info in file.infolist() if info.filename.endswith("data/0"))
    data = path.read_bytes()
    start = data.index(torch.full((1000,), 1.0).numpy().tobytes())
    for offset in range(0, record.file_size, 397):
        changed = bytearray(data)
        changed[start + offset] ^= 1
        path.write_bytes(changed)
        assert not is_intact(path)


def save_on_and_on(path, step, pipe):
    while True:
        step += 1
        write({"global_step": step, "w": torch.randn(2_000_000)}, path)
        pipe.send(step)


def save_in_background(path, step, pipe):
    files = CheckpointFiles(background=True)
    files.save_checkpoint({"global_step": step + 1, "w": torch.randn(2_000_000)}, path)
    while True:
        step += 1
        files.save_checkpoint({"global_step": step + 1, "w": torch.randn(2_000_000)}, path)
        pipe.send(step)  # the one before is there by now


def on_one_thread(save, *args):
    torch.set_num_threads(1)  # the threads of the process that was forked are not here
    save(*args)


@pytest.mark.parametrize("save", [save_on_and_on, save_in_background])
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path, save):
    context = multiprocessing.get_context("fork")
    step = 0
    for delay in (0.0, 0.002, 0.005, 0.011, 0.017, 0.023):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=on_one_thread, args=(save, tmp_path / "last.ckpt", step, sender))
        process.start()
        written = receiver.recv()
        time.sleep(delay)
        process.kill()
        process.join()
        path, step, damaged = newest_complete([tmp_path])
        assert step >= written and not damaged and path.name in ("last.ckpt", "last-previous.ckpt")
    write(checkpoint(step + 1), tmp_path / "last.ckpt")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last-previous.ckpt", "last.ckpt"]  # leftovers are gone


def test_a_save_that_was_killed_before_its_last_step_is_followed_by_a_clean_one(tmp_path):
    """Killed between keeping the old file under its second name and putting the new one in its place."""
    for step in (1, 2):
        write(checkpoint(step), tmp_path / "last.ckpt")
    (tmp_path / "last-previous.ckpt").unlink()
    os.link(tmp_path / "last.ckpt", tmp_path / "last-previous.ckpt")
    write(checkpoint(3), tmp_path / "last.ckpt")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last-previous.ckpt", "last.ckpt"]
    assert [step_of(p) for p in sorted(tmp_path.iterdir())] == [2, 3]


def test_a_full_disk_costs_one_line_and_no_checkpoint(tmp_path):
    """A limit on the size of files stands for the full disk: writing fails midway."""
    script = f"""
import resource, signal, warnings
from pathlib import Path
import torch
from ditlit.resilience import CheckpointFiles
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
files, path = CheckpointFiles(), Path({str(tmp_path)!r}) / "step=2.ckpt"
files.save_checkpoint({{"global_step": 1}}, path.with_name("step=1.ckpt"))
large = {{"global_step": 2, "w": torch.zeros(1_000_000)}}
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
files.save_checkpoint(large, path)
files.remove_checkpoint(path.with_name("step=1.ckpt"))
assert files.error is not None and sorted(p.name for p in path.parent.iterdir()) == ["step=1.ckpt"]
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
files.save_checkpoint(large, path)
files.remove_checkpoint(path.with_name("step=1.ckpt"))
assert files.error is None and sorted(p.name for p in path.parent.iterdir()) == ["step=2.ckpt"]
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stderr.splitlines() if "could not save" in line]
    assert (
        len(lines) == 1 and "step=2.ckpt (File too large); earlier checkpoints stay and training goes on." in lines[0]
    )
    assert newest_complete([tmp_path])[1] == 2


# In the background --------------------------------------------------------------------------------------------------


@pytest.fixture
def slow(monkeypatch):
    """Writing waits until it is let go; what is written is what the second argument of ``write`` names."""
    gate, started = threading.Event(), threading.Event()

    def slow_write(content, path):
        started.set()
        assert gate.wait(10)
        write(content, path)

    monkeypatch.setattr("ditlit.resilience.checkpoint_files.write", slow_write)
    yield started, gate
    gate.set()


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, slow):
    started, gate = slow
    files, content, path = CheckpointFiles(background=True), checkpoint(1), tmp_path / "last.ckpt"
    content["lr_schedulers"] = [{"last": [1]}]
    files.save_checkpoint(content, path)
    assert started.wait(10) and not path.exists()
    content["state_dict"]["w"].add_(1)  # as the next steps do
    content["lr_schedulers"][0]["last"].append(2)
    gate.set()
    files.finish()
    saved = torch.load(path)
    assert torch.equal(saved["state_dict"]["w"], torch.full((1000,), 1.0)) and saved["lr_schedulers"] == [{"last": [1]}]


def test_one_checkpoint_is_written_at_a_time_and_readers_wait(tmp_path, slow):
    _, gate = slow
    files, path = CheckpointFiles(background=True), tmp_path / "last.ckpt"
    threading.Timer(0.1, gate.set).start()
    files.save_checkpoint(checkpoint(1), path)
    files.save_checkpoint(checkpoint(2), path)  # the first is there now
    assert step_of(path) in (1, 2)
    assert files.load_checkpoint(path)["global_step"] == 2
    assert newest_complete([tmp_path])[0] == path and step_of(path.with_name("last-previous.ckpt")) == 1


def test_a_file_is_not_removed_before_the_one_that_replaces_it_is_there(tmp_path, slow):
    _, gate = slow
    files, old, new = CheckpointFiles(background=True), tmp_path / "step=1.ckpt", tmp_path / "step=2.ckpt"
    write(checkpoint(1), old)
    files.save_checkpoint(checkpoint(2), new)
    files.remove_checkpoint(old)
    assert old.exists() and not new.exists()
    gate.set()
    files.teardown()
    assert new.exists() and not old.exists()


def test_the_end_of_training_waits(make_module, make_trainer, datamodule, tmp_path, slow):
    _, gate = slow
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_last="link")
    threading.Timer(0.3, gate.set).start()
    files = CheckpointFiles(background=True)
    make_trainer(callbacks=[save], plugins=[files], enable_checkpointing=True).fit(make_module(), datamodule)
    assert sorted(p.name for p in tmp_path.glob("*.ckpt")) == ["last.ckpt", "step=4.ckpt"]
    assert (tmp_path / "last.ckpt").is_symlink() and step_of(tmp_path / "last.ckpt") == 4
    assert not any(thread.name.startswith("checkpoint") for thread in threading.enumerate())


def test_the_background_changes_nothing(make_module, make_trainer, datamodule, tmp_path):
    for background in (False, True):
        save = ModelCheckpoint(tmp_path / str(background), filename="x", every_n_train_steps=3)
        trainer = make_trainer(callbacks=[save], plugins=[CheckpointFiles(background)], enable_checkpointing=True)
        trainer.fit(make_module(), datamodule)
    ours, theirs = (torch.load(tmp_path / name / "x.ckpt") for name in ("True", "False"))
    for key in ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "loops"):
        assert_same(ours[key], theirs[key], key)


def test_errors_end_up_where_those_of_the_foreground_do(tmp_path, monkeypatch):
    def full(content, path):
        raise OSError(28, "No space left on device")

    files, old = CheckpointFiles(background=True), tmp_path / "step=1.ckpt"
    write(checkpoint(1), old)
    monkeypatch.setattr("ditlit.resilience.checkpoint_files.write", full)
    with pytest.warns(UserWarning, match=r"could not save step 2 .*No space left on device.*training goes on"):
        files.save_checkpoint(checkpoint(2), tmp_path / "step=2.ckpt")
        files.remove_checkpoint(old)
        assert files.error.errno == 28
    files.teardown()
    assert old.exists()
    monkeypatch.setattr("ditlit.resilience.checkpoint_files.write", write)
    files.save_checkpoint(checkpoint(3), tmp_path / "step=3.ckpt")
    files.remove_checkpoint(old)
    assert files.error is None and not old.exists()

    def broken(content, path):
        raise MemoryError("no memory to write with")

    monkeypatch.setattr("ditlit.resilience.checkpoint_files.write", broken)
    files.save_checkpoint(checkpoint(4), tmp_path / "step=4.ckpt")
    with pytest.raises(MemoryError, match="no memory to write with"):
        files.save_checkpoint(checkpoint(5), tmp_path / "step=5.ckpt")
    files.teardown()


# Foreign code --------------------------------------------------------------------------------------------------------


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["callbacks", "loops", "hyper_parameters"])
def test_no_code_in_a_checkpoint_is_run(tmp_path, monkeypatch, make_module, make_trainer, datamodule, zipped, place):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path = Path("evil.ckpt")
    content = checkpoint(1) | {place: Malicious()}
    if zipped:
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    for ask in (None, False, True):
        with pytest.raises(InputError, match=r"evil.ckpt cannot be read as a checkpoint"):
            make_trainer(plugins=[CheckpointFiles()]).fit(make_module(), datamodule, ckpt_path=path, weights_only=ask)
    path.rename("last.ckpt")
    with pytest.raises(InputError, match="no checkpoint of this run is whole"):
        newest_complete([tmp_path])
    assert not Path("executed").exists()
