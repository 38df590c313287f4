"""Remote stores: through S3 and HTTP on the loopback, a cache smaller than the store, and every kind of mishap."""

import contextlib
import functools
import http.server
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from numbered import SHARDS, K, N, cached_bytes, numbered, shard_bytes, write

from ditlit.data import LatentDataModule, LatentStore, ShardCache, folders, write_store
from ditlit.data import cache as cache_module
from ditlit.data.audit import audit
from ditlit.errors import InputError


@pytest.fixture(scope="module")
def s3():
    """An S3 server on the loopback, found by its environment variables; gives its address."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    patch = pytest.MonkeyPatch()
    for name, value in dict(
        AWS_ENDPOINT_URL=f"http://{host}:{port}",
        AWS_ACCESS_KEY_ID="test",
        AWS_SECRET_ACCESS_KEY="test",
        AWS_DEFAULT_REGION="us-east-1",
        NO_PROXY="127.0.0.1",
    ).items():
        patch.setenv(name, value)
    import s3fs

    s3fs.S3FileSystem(skip_instance_cache=True).mkdir("bucket")
    yield host, port
    patch.undo()
    server.stop()


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(folders, "WAITS", (0.01, 0.01))
    monkeypatch.setattr(cache_module, "POLL", 0.01)


@pytest.fixture(scope="module")
def remote(s3):
    write("s3://bucket/numbered")
    return "s3://bucket/numbered"


@pytest.fixture
def shelf(tmp_path):
    """A store in this process's memory, reached like any remote one."""
    url = f"memory://{tmp_path.name}/store"
    write(url)
    return url


class Gauge(threading.Thread):
    """Watches the size of a cache while it is in use."""

    def __init__(self, folder):
        super().__init__(daemon=True)
        self.folder, self.highest, self.on = folder, 0, True

    def run(self):
        while self.on:
            if Path(self.folder).is_dir():
                self.highest = max(self.highest, cached_bytes(self.folder))
            time.sleep(0.0005)

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.on = False
        self.join()


def datamodule(store, cache, step=0, shards=4, **settings):
    data = LatentDataModule(
        store,
        **dict(
            global_batch_size=8, flip=False, shuffle_window=2, cache_dir=str(cache),
            cache_size_gb=shards * shard_bytes() / 1e9,
        ) | settings,
    )  # fmt: skip
    data.prepare_data()
    data.setup()
    data.trainer = SimpleNamespace(world_size=1, global_rank=0, accumulate_grad_batches=1, global_step=step)
    return data


def read(data, batches):
    iterator = iter(data.train_dataloader())
    return torch.cat([next(iterator)["latents"][:, 0, 0, 0] for _ in range(batches)]).int().tolist()


# Round trips ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["moments", "latents"])
def test_a_store_written_to_s3_reads_back_bit_for_bit(s3, tmp_path, kind):
    generator = torch.Generator().manual_seed(0)
    latents, flipped = (torch.randn(23, 2, 4, 6, generator=generator).half() for _ in range(2))
    write_store(
        f"s3://bucket/{kind}", latents, torch.arange(23) % 5, 5, flipped, kind, shard_size=8, vae={"source": "x"}
    )
    store = LatentStore(f"s3://bucket/{kind}", ShardCache(tmp_path))
    index, flip = torch.randperm(23, generator=generator), torch.arange(23) % 2 == 0
    batch = store.gather(index, flip)
    assert torch.equal(batch[kind], torch.where(flip[:, None, None, None], flipped[index], latents[index]))
    assert torch.equal(batch["labels"], index % 5)
    with pytest.raises(InputError, match=f"s3://bucket/{kind} already holds a latent store"):
        write_store(f"s3://bucket/{kind}", latents, torch.arange(23) % 5, 5)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_store_larger_than_the_cache_is_read_whole_and_the_cache_never_overflows(remote, tmp_path, workers):
    with Gauge(tmp_path / "cache") as gauge:
        data = datamodule(remote, tmp_path / "cache", num_workers=workers)
        assert sorted(read(data, 12)) == list(range(N))
        assert sorted(read(data, 12)) == list(range(N))
    assert 2 * shard_bytes() < gauge.highest <= 4 * shard_bytes()


def test_a_local_copy_gives_the_same_order(remote, tmp_path):
    write(tmp_path / "copy")
    local = read(datamodule(str(tmp_path / "copy"), tmp_path / "unused"), 20)
    assert read(datamodule(remote, tmp_path / "cache"), 20) == local
    assert read(datamodule(remote, tmp_path / "large", shards=100), 20) == local
    assert not (tmp_path / "unused").exists()


def test_a_run_that_continues_within_an_epoch_sees_the_remaining_samples_only(remote, tmp_path):
    before = read(datamodule(remote, tmp_path / "cache"), 5)
    after = read(datamodule(remote, tmp_path / "cache", step=5), 7)
    assert sorted(before + after) == list(range(N))


def test_local_and_remote_stores_mix(remote, tmp_path):
    local = str(tmp_path / "local")
    write_store(local, numbered(16)[0].half() - 16, numbered(16)[1], K)
    numbers = read(datamodule({remote: 1, local: 1}, tmp_path / "cache"), (N + 16) // 8)
    assert sum(number < 0 for number in numbers) == (N + 16) // 2


def test_validation_reads_few_shards(remote, tmp_path):
    data = datamodule(remote, tmp_path / "cache", val_size=10, val_batch_size=5, shards=6)
    held_out = torch.cat([batch["latents"][:, 0, 0, 0] for batch in data.val_dataloader()]).int().tolist()
    assert len(set(held_out)) == 10 and len({number // (N // SHARDS) for number in held_out}) == 2
    assert cached_bytes(tmp_path / "cache") == 2 * shard_bytes()
    assert not set(held_out) & set(read(data, 10))


def test_a_store_behind_a_plain_web_server(tmp_path):
    write(tmp_path / "www" / "store")
    with web_server(tmp_path / "www") as url:
        store = LatentStore(f"{url}/store", ShardCache(tmp_path / "cache"))
        index = torch.randperm(N, generator=torch.Generator().manual_seed(0))
        assert torch.equal(store.gather(index)["latents"], numbered()[0][index])
        with pytest.raises(InputError, match=f"cannot access {url}/nothing/manifest.json: FileNotFoundError"):
            LatentStore(f"{url}/nothing")


@contextlib.contextmanager
def web_server(folder):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield "http://{}:{}".format(*server.server_address)
    server.shutdown()
    server.server_close()


# Mishaps -------------------------------------------------------------------------------------------------------------


class Proxy:
    """Passes requests on to a server, and hangs up half-way through the next ``cuts`` large answers."""

    def __init__(self, target, cuts):
        self.target, self.cuts, self.cut = target, cuts, 0
        self.socket = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self.accept, daemon=True).start()

    @property
    def url(self):
        return "http://{}:{}".format(*self.socket.getsockname())

    def accept(self):
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self.serve, args=(self.socket.accept()[0],), daemon=True).start()

    def serve(self, client):
        with client, socket.create_connection(self.target) as server, contextlib.suppress(OSError):
            threading.Thread(target=self.pump, args=(client, server), daemon=True).start()
            answer = 0
            while data := server.recv(512):
                if answer > 1024 and self.cut < self.cuts:
                    self.cut += 1
                    client.shutdown(socket.SHUT_RDWR)
                    return
                answer += len(data)
                client.sendall(data)

    def pump(self, source, sink):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)


def test_a_connection_that_drops_within_a_shard_is_made_again(s3, remote, tmp_path, monkeypatch):
    proxy = Proxy(s3, cuts=0)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    store = LatentStore(remote, ShardCache(tmp_path))
    proxy.cuts = 1
    assert torch.equal(store.gather(torch.arange(N))["latents"], numbered()[0])
    assert proxy.cut == 1


def test_a_connection_that_keeps_dropping_ends_with_the_url(tmp_path):
    write(tmp_path / "www" / "store")
    with web_server(tmp_path / "www") as url:
        proxy = Proxy(url.removeprefix("http://").split(":"), cuts=0)
        store = LatentStore(f"{proxy.url}/store", ShardCache(tmp_path / "cache"))
        proxy.cuts = 100
        with pytest.raises(
            InputError, match=rf"cannot access {proxy.url}/store/shard-00000.safetensors after 3 attemp"
        ):
            store.gather(torch.arange(3))
        proxy.cuts = 0
        assert store.gather(torch.arange(3))["labels"].tolist() == [0, 1, 2]
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix in (".tmp", ".claim")]


def change(url, name, edit):
    folder = folders.open_folder(url)
    data = bytearray(folder.read(name))
    edit(data)
    folder.write(name, bytes(data))


def flip_a_bit(data):
    data[-300] ^= 1


def test_a_corrupted_object_is_refused_with_its_url(s3, tmp_path):
    write("s3://bucket/corrupt")
    change("s3://bucket/corrupt", "shard-00001.safetensors", flip_a_bit)
    store = LatentStore("s3://bucket/corrupt", ShardCache(tmp_path))
    assert store.gather(torch.arange(8))["latents"][:, 0, 0, 0].tolist() == list(range(8))
    with pytest.raises(InputError, match=r"s3://bucket/corrupt/shard-00001.safetensors .*is corrupt: its SHA-256"):
        store.gather(torch.tensor([9]))


def test_a_truncated_object_is_refused(shelf, tmp_path):
    change(shelf, "shard-00001.safetensors", lambda data: data.pop())
    with pytest.raises(InputError, match=r"shard-00001.safetensors has .* bytes where the manifest says"):
        LatentStore(shelf, ShardCache(tmp_path)).gather(torch.tensor([9]))


def test_a_missing_object_is_reported_at_once(s3, tmp_path, monkeypatch):
    write("s3://bucket/missing")
    folders.open_folder("s3://bucket/missing")._filesystem()[0].rm("bucket/missing/shard-00003.safetensors")
    monkeypatch.setattr(folders.time, "sleep", lambda seconds: pytest.fail("waited for a missing object"))
    store = LatentStore("s3://bucket/missing", ShardCache(tmp_path))
    with pytest.raises(InputError, match=r"cannot access s3://bucket/missing/shard-00003.safetensors: FileNotFound"):
        store.gather(torch.tensor([25]))
    with pytest.raises(InputError, match=r"cannot access s3://bucket/nothing/manifest.json: FileNotFoundError"):
        LatentStore("s3://bucket/nothing", ShardCache(tmp_path))


def test_labels_of_a_remote_store_are_checked(shelf, tmp_path):
    change(shelf, "labels.safetensors", flip_a_bit)
    with pytest.raises(InputError, match=r"labels.safetensors is corrupt"):
        LatentStore(shelf, ShardCache(tmp_path))


def test_an_audit_reads_remote_stores_past_the_cache(shelf, tmp_path):
    LatentStore(shelf, ShardCache(tmp_path)).gather(torch.arange(N))
    assert audit(shelf) == []
    change(shelf, "shard-00001.safetensors", flip_a_bit)
    (problem,) = audit(shelf)
    assert f"{shelf}/shard-00001.safetensors is corrupt: its SHA-256" in problem


def test_a_cache_too_small_for_two_windows_is_refused_before_training(shelf, tmp_path):
    with pytest.raises(InputError, match=r"cannot hold .* two windows of shuffle_window shards .* set it to"):
        datamodule(shelf, tmp_path, shards=3.9)
    with pytest.raises(InputError, match="positive size"):
        ShardCache(tmp_path, 0)


# Two processes -------------------------------------------------------------------------------------------------------


def test_two_processes_share_a_cache_and_see_every_sample_once(remote, tmp_path):
    config = {
        "model": {
            "denoiser": {
                "class_path": "ditlit.models.DiT",
                "init_args": dict(
                    input_size=8, in_channels=1, num_classes=K, patch_size=4, hidden_size=16, depth=1, num_heads=2
                ),
            },
            "ema": None,
        },
        "data": {
            "class_path": "ditlit.data.LatentDataModule",
            "init_args": dict(
                store=remote, global_batch_size=8, shuffle_window=2, num_workers=2,
                cache_dir=str(tmp_path / "cache"), cache_size_gb=4 * shard_bytes() / 1e9,
            ),
        },
        "trainer": {
            "accelerator": "cpu", "devices": 2, "strategy": "ddp", "default_root_dir": str(tmp_path),
            "max_steps": N // 8, "max_epochs": -1, "check_val_every_n_epoch": None, "logger": False,
            "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
            "callbacks": [{"class_path": "losses.RecordSamples", "init_args": {"folder": str(tmp_path)}}],
        },
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "ditlit", "fit", "--config", str(tmp_path / "run.yaml")]
    with open(tmp_path / "log.txt", "w") as log, Gauge(tmp_path / "cache") as gauge:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            assert process.wait(timeout=120) == 0, (tmp_path / "log.txt").read_text()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    seen = [list(map(int, (tmp_path / f"samples{rank}.txt").read_text().split())) for rank in range(2)]
    assert sorted(seen[0] + seen[1]) == list(range(N)) and len(seen[0]) == N // 2
    assert 2 * shard_bytes() < gauge.highest <= 4 * shard_bytes()
