"""Processes that read ahead: batches arrive on any machine, and no worker is lost unnoticed or outlives its use."""

import itertools
import multiprocessing
import os
import resource
import signal
import subprocess
import time

import pytest
import torch
from torch.utils.data import Dataset

from ditlit.data.workers import Loader, lost_worker
from ditlit.errors import InputError


def batch_of(i):
    return {
        "latents": torch.full((4, 3, 2), i + 0.5, dtype=torch.bfloat16),
        "valid": torch.tensor([True, False])[: i % 3],  # sometimes empty
        "rest": (torch.arange(5)[::2] + i, [f"{i}"], torch.tensor(i)),
    }


class Data(Dataset):
    """What becomes of a worker that reads batch ``at``."""

    def __init__(self, happening=lambda: None, at=3):
        self.happening, self.at = happening, at

    def __getitem__(self, i):
        if i == self.at:
            self.happening()
        return batch_of(i)


def use_up_descriptors():
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
    try:
        while True:
            os.dup(0)
    except OSError:
        pass


def be_killed():
    os.kill(os.getpid(), signal.SIGKILL)


def mistake():
    raise InputError("store/shard-00001 is corrupt: its SHA-256 differs\n  twice")


def loader(happening=lambda: None, n=20, num_workers=2, batch_bytes=1000, **settings):
    return Loader(Data(happening), range(n), num_workers, batch_bytes, **settings)


def check(found, expected):
    for key in ("latents", "valid"):
        assert found[key].dtype == expected[key].dtype and torch.equal(found[key], expected[key])
    (a, names, number), (b, other_names, other_number) = found["rest"], expected["rest"]
    assert torch.equal(a, b) and names == other_names and torch.equal(number, other_number)


@pytest.mark.parametrize("happening", [lambda: None, use_up_descriptors], ids=["", "no descriptors"])
@pytest.mark.parametrize("batch_bytes", [1000, 1], ids=["", "larger than expected"])
def test_batches_come_as_they_were_read(happening, batch_bytes):
    batches = list(loader(happening, batch_bytes=batch_bytes))  # kept: their memory is their own
    assert len(batches) == 20
    for i, batch in enumerate(batches):
        check(batch, batch_of(i))


def test_workers_are_kept_between_epochs_even_where_one_is_left_early():
    data = loader(persistent_workers=True)
    first = {child.pid for child in multiprocessing.active_children()}
    for batch, expected in zip(itertools.islice(data, 5), range(5), strict=True):
        check(batch, batch_of(expected))
    workers = {child.pid for child in multiprocessing.active_children()} - first
    for i, batch in enumerate(data):
        check(batch, batch_of(i))
    assert len(workers) == 2 and {child.pid for child in multiprocessing.active_children()} - first == workers


@pytest.mark.parametrize(
    ("happening", "message"),
    [
        (be_killed, "was killed, most likely because the memory ran out: lower num_workers .*--data.num_workers"),
        (lambda: os._exit(3), "has crashed .with exit code 3"),
        (mistake, r"^store/shard-00001 is corrupt: its SHA-256 differs\n  twice$"),
    ],
)
def test_a_worker_that_dies_or_fails_ends_the_loop_in_one_line(happening, message):
    start = time.monotonic()
    # The signal of its death may come anywhere, so commands put it in words too.
    with pytest.raises((InputError, RuntimeError)) as error:
        for _ in loader(happening):
            time.sleep(0.05)
    text = str(error.value) if isinstance(error.value, InputError) else lost_worker(error.value)
    with pytest.raises(InputError, match=message):
        raise InputError(text)
    assert time.monotonic() - start < 10
    assert lost_worker(RuntimeError("another")) is None and lost_worker(InputError("DataLoader worker (pid")) is None


def children():
    return [child.pid for child in multiprocessing.active_children()]


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(") ", 1)[1][0] != "Z"
    except FileNotFoundError:
        return False


def ended_within(seconds, pids):
    deadline = time.monotonic() + seconds
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(map(is_running, pids))


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks at processes as Linux shows them")
def test_workers_leave_signals_to_their_parent():
    before = set(children())
    batches = iter(loader())
    check(next(batches), batch_of(0))
    workers = [pid for pid in children() if pid not in before]
    for name in ("TERM", "INT", "USR1"):
        subprocess.run(["kill", f"-{name}", *map(str, workers)], check=True)  # from another process, as a scheduler
    time.sleep(0.2)
    assert all(map(is_running, workers)) and len(list(batches)) == 19
    assert ended_within(5, workers)  # at the end of the loop
    batches = iter(loader())
    next(batches)
    workers = [child for child in multiprocessing.active_children() if child.pid not in before]
    for worker in workers:
        worker.terminate()  # what the parent does to one that does not come to an end
    assert ended_within(1, [worker.pid for worker in workers])


def read_until_killed(connection):
    batches = iter(loader(n=1000))
    next(batches)
    connection.send(children())
    signal.pause()


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks at processes as Linux shows them")
def test_workers_end_when_their_parent_is_killed():
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("fork")
    parent = context.Process(target=read_until_killed, args=(theirs,))
    parent.start()
    workers = ours.recv()
    assert len(workers) == 2 and all(map(is_running, workers))
    parent.kill()
    parent.join()
    assert ended_within(5, workers)
