"""No rank waits for ever for one that is gone, and the message names it."""

import contextlib
import os
import signal
import socket
import time
from datetime import timedelta

import pytest
import ranks as processes
import torch.distributed as dist
from own import Mortal
from PIL import Image
from runs import start

from ditlit.watchdog import RankWatchdog

PATIENCE = 0.8  # seconds; a busy machine may well hold up a thread for a third of one


@pytest.fixture
def ranks():
    """Three watchdogs with short times, and what they gave up with."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    said = [[] for _ in range(3)]
    watchdogs = []
    for rank in range(3):
        client = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=1))
        times = dict(interval=0.02, patience=PATIENCE, grace=0.1)
        watchdogs.append(RankWatchdog(client, rank, 3, said[rank].append, **times))
    for watchdog in watchdogs:
        watchdog.start()
    yield watchdogs, said
    for watchdog in watchdogs:
        watchdog._ended.set()
    del server


def die(watchdog):
    """As when the process is killed: no word, no further sign of life."""
    watchdog._ended.set()


def wait_for(said, expected):
    deadline = time.monotonic() + 20
    while said != expected and time.monotonic() < deadline:
        time.sleep(0.02)
    assert said == expected


def test_the_living_are_left_alone_and_may_end_at_different_times(ranks):
    watchdogs, said = ranks
    for watchdog in (watchdogs[2], watchdogs[1], watchdogs[0]):
        time.sleep(PATIENCE + 0.2)
        watchdog.end()
    assert said == [[], [], []]


@pytest.mark.parametrize("dead", [0, 2])
def test_the_dead_rank_is_named_by_all_others(ranks, dead):
    watchdogs, said = ranks
    time.sleep(0.1)
    die(watchdogs[dead])
    gone = [f"rank {dead} is gone: no sign of life for 1 seconds"]
    wait_for(said, [[] if rank == dead else gone for rank in range(3)])


def test_a_rank_that_fails_says_why(ranks):
    watchdogs, said = ranks
    watchdogs[1].fail("InputError: shard-00003.safetensors is missing")
    failed = ["rank 1 failed (InputError: shard-00003.safetensors is missing)"]
    wait_for(said, [failed, [], failed])


def test_ranks_that_fail_together_end_with_their_own_messages(ranks):
    watchdogs, said = ranks
    for watchdog in watchdogs:
        watchdog._ended.set()
    for watchdog in watchdogs:
        watchdog.fail("InputError: the same everywhere")
    assert said == [[], [], []]


@pytest.mark.parametrize("rank, killed", [(0, False), (1, False), (0, True)])
def test_a_rank_that_is_gone_ends_sampling(tmp_path, make_module, make_trainer, datamodule, rank, killed):
    trainer = make_trainer(max_steps=1)
    trainer.fit(make_module(denoiser=Mortal(rank, killed)), datamodule)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    words = ["sample", "--ckpt", str(tmp_path / "x.ckpt"), "--trust", "own", "--vae", "pixels", "--num_steps", "2",
             "--batch_size", "1", "--accelerator", "cpu", "--out", str(tmp_path / "out")]  # fmt: skip
    codes = processes.run(2, words, tmp_path)
    log = (tmp_path / "log.txt").read_text()
    assert codes[rank] == (-signal.SIGKILL if killed else 1) and codes[1 - rank] == 1, log
    reason = f"rank {rank} is gone" if killed else f"rank {rank} failed (RuntimeError: this rank cannot go on)"
    assert f"ditlit: rank {1 - rank} stops because {reason}" in log, log
    assert "Run the command again to go on" in log


def test_a_rank_that_fails_ends_evaluation(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(20):
            Image.new("RGB", (8, 8), (i, 10 * i, 255 - i)).save(tmp_path / name / f"{i}.png")
    words = ["evaluate", "--generated", str(tmp_path / "a"), "--reference", str(tmp_path / "b"), "--extractor",
             "extractor.Broken", "--batch_size", "4", "--num_workers", "0", "--metrics", "fid", "--accelerator",
             "cpu"]  # fmt: skip
    assert processes.run(2, words, tmp_path) == [1, 1]
    log = (tmp_path / "log.txt").read_text()
    assert "ditlit: rank 0 stops because rank 1 failed (RuntimeError: this rank cannot go on)" in log, log


@pytest.mark.parametrize("dead", [0, 1])
def test_a_killed_rank_ends_the_run(tmp_path, store, dead):
    process = start(tmp_path / "run", store, 2, kill_at=3, kill_rank=dead)
    try:
        assert process.wait(timeout=100) < 0
        deadline = time.monotonic() + 60
        with contextlib.suppress(ProcessLookupError):
            while time.monotonic() < deadline:
                os.killpg(process.pid, 0)  # until none of its processes is left
                time.sleep(0.1)
            pytest.fail("a rank was still waiting a minute later")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    log = (tmp_path / "run" / "log.txt").read_text()
    if dead == 0:
        assert "ditlit: rank 1 stops because rank 0 is gone" in log and "Traceback" not in log
    else:  # Lightning watches the processes that it has started itself
        assert "[rank: 1] Child process" in log and "terminated with code -9" in log
