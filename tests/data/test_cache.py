"""The cache for shards of remote stores: fetched once, bounded, read ahead, and clean after accidents."""

import fcntl
import os
import threading
import time

import pytest
import torch
from numbered import N, cache_for, cached_bytes, numbered, shard_bytes, write

from ditlit.data import LatentStore, ShardCache, folders
from ditlit.data import cache as cache_module
from ditlit.errors import InputError


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(folders, "WAITS", (0.01, 0.01))
    monkeypatch.setattr(cache_module, "POLL", 0.01)


@pytest.fixture
def shelf(tmp_path):
    """A store in this process's memory, reached like any remote one."""
    url = f"memory://{tmp_path.name}/store"
    write(url)
    return url


def test_a_shard_is_fetched_once_for_all_stores_and_runs(shelf, tmp_path, monkeypatch):
    first = LatentStore(shelf, ShardCache(tmp_path))
    first.gather(torch.arange(N))
    copy = shelf + "-copy"
    write(copy)
    monkeypatch.setattr(folders.RemoteFolder, "download", lambda *_: pytest.fail("fetched again"))
    for url in (shelf, copy):
        assert torch.equal(LatentStore(url, ShardCache(tmp_path)).gather(torch.arange(N))["latents"], numbered()[0])


def test_those_used_longest_ago_make_room(shelf, tmp_path):
    store = LatentStore(shelf, cache_for(tmp_path, 3))
    shards = [shard.sha256 for shard in store.manifest.shards]
    for number in (0, 1, 2, 0, 3):
        store.gather(torch.tensor([8 * number]))
        time.sleep(0.01)  # the file system's clock ticks
    assert {name for name in os.listdir(tmp_path) if name in shards} == {shards[0], shards[2], shards[3]}


def test_what_another_process_reads_keeps_its_place(shelf, tmp_path, monkeypatch):
    store = LatentStore(shelf, cache_for(tmp_path, 1))
    other = LatentStore(shelf, cache_for(tmp_path, 1))
    monkeypatch.setattr(cache_module, "PATIENCE", 0.05)
    with other.cache.open(other.folder, other.manifest.shards[0]) as path:
        with pytest.raises(InputError, match=r"has no room for memory://.*shard-00005.* raise cache_size_gb"):
            store.gather(torch.tensor([40]))
        assert path.exists()
    assert store.gather(torch.tensor([40]))["labels"].tolist() == [0]
    assert not path.exists()


def test_shards_are_read_ahead_and_kept_until_others_are_wanted(shelf, tmp_path):
    store = LatentStore(shelf, cache_for(tmp_path, 4))
    shards = store.manifest.shards
    store.cache.prefetch([(store.folder, shards[i]) for i in (4, 5, 6)])
    wait_for(lambda: all((tmp_path / shards[i].sha256).exists() for i in (4, 5, 6)))
    for number in (0, 1, 2):
        store.gather(torch.tensor([8 * number]))
    assert all((tmp_path / shards[i].sha256).exists() for i in (4, 5, 6))
    store.cache.prefetch([(store.folder, shards[i]) for i in (7, 8, 9)])
    wait_for(lambda: all((tmp_path / shards[i].sha256).exists() for i in (7, 8, 9)))


def test_a_shard_that_has_just_arrived_is_not_counted_twice(shelf, tmp_path):
    """Its claim outlives its download by a moment; counted beside the file it would push out what is read ahead."""
    store = LatentStore(shelf, cache_for(tmp_path, 4))
    shards = store.manifest.shards
    store.cache.prefetch([(store.folder, shards[i]) for i in (4, 5, 6)])
    wait_for(lambda: all((tmp_path / shards[i].sha256).exists() for i in (4, 5, 6)))
    wait_for(lambda: not list(tmp_path.glob(".*.claim")))
    with open(tmp_path / f".{shards[6].sha256}.claim", "w") as claim:
        fcntl.flock(claim, fcntl.LOCK_EX)
        claim.write(str(shard_bytes()))
        claim.flush()
        store.gather(torch.tensor([0]))
    assert all((tmp_path / shards[i].sha256).exists() for i in (0, 4, 5, 6))


def wait_for(condition, seconds=5):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_errors_while_reading_ahead_are_left_to_the_reader(shelf, tmp_path):
    store = LatentStore(shelf, ShardCache(tmp_path))
    store.folder._filesystem()[0].rm(f"{shelf.removeprefix('memory:/')}/shard-00000.safetensors")
    store.cache.prefetch([(store.folder, shard) for shard in store.manifest.shards])
    assert store.gather(torch.tensor([8]))["labels"].tolist() == [0]
    with pytest.raises(InputError, match=r"shard-00000.safetensors: FileNotFoundError"):
        store.gather(torch.tensor([0]))


def test_what_a_killed_process_left_behind_is_cleared_away(shelf, tmp_path):
    store = LatentStore(shelf, cache_for(tmp_path, 1))
    shard = store.manifest.shards[0].sha256
    (tmp_path / f".{shard}.claim").write_text(str(shard_bytes()))
    (tmp_path / f".{shard}.123.tmp").write_bytes(bytes(shard_bytes()))
    assert store.gather(torch.tensor([8]))["labels"].tolist() == [0]
    assert cached_bytes(tmp_path) == shard_bytes() and not list(tmp_path.glob(".*.claim"))


def test_a_cached_file_that_was_cut_short_is_fetched_again(shelf, tmp_path):
    store = LatentStore(shelf, ShardCache(tmp_path))
    store.gather(torch.tensor([0]))
    os.truncate(tmp_path / store.manifest.shards[0].sha256, 0)
    assert torch.equal(store.gather(torch.arange(8))["latents"], numbered(8)[0])


def test_closing_a_cache_ends_its_threads(shelf, tmp_path):
    def threads():
        return sum(thread.name == "ditlit-read-ahead" for thread in threading.enumerate())

    before = threads()
    store = LatentStore(shelf, ShardCache(tmp_path))
    store.cache.prefetch([(store.folder, shard) for shard in store.manifest.shards])
    assert threads() > before
    store.cache.close()
    wait_for(lambda: threads() == before)
