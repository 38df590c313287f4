"""Checkpoints outlive crashes, damage and full disks, and no code in them is run."""

import multiprocessing
import os
import pickle
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

from ditlit.errors import InputError
from ditlit.training import CheckpointFiles
from ditlit.training.checkpoint_files import is_intact, newest_complete, write


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


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    context = multiprocessing.get_context("fork")
    step = 0
    for delay in (0.0, 0.002, 0.005, 0.011, 0.017, 0.023):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=save_on_and_on, args=(tmp_path / "last.ckpt", step, sender))
        process.start()
        written = receiver.recv()
        time.sleep(delay)
        process.kill()
        process.join()
        path, step, damaged = newest_complete([tmp_path])
        assert step >= written and not damaged and path.name in ("last.ckpt", "last-previous.ckpt")
    write(checkpoint(step + 1), tmp_path / "last.ckpt")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last-previous.ckpt", "last.ckpt"]  # leftovers are gone


def test_a_full_disk_costs_one_line_and_no_checkpoint(tmp_path):
    """A limit on the size of files stands for the full disk: writing fails midway."""
    script = f"""
import resource, signal, warnings
from pathlib import Path
import torch
from ditlit.training import CheckpointFiles
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
