"""Stores made or damaged by an enemy end in one clear error: no crash, no hang, no huge allocation."""

import copy
import json
import random
import resource
import sys
import time

import pytest
import torch

from ditlit.__main__ import main
from ditlit.data import write_store
from ditlit.data.folders import LocalFolder
from ditlit.data.manifest import Manifest, Shard, read_manifest
from ditlit.data.shards import parse_shard, write_tensors
from ditlit.data.store import LatentStore
from ditlit.errors import InputError

N, SHAPE, K = 6, (2, 4, 4), 3
HOSTILE = [
    None, True, False, -1, 0, 1, 2, 3, 2**31, 2**63, 2**64, -(2**63), 10**30, 0.5, -0.0, float("nan"), float("inf"),
    1e308, "", "F16", "F64", "moments", "labels", "../../etc/passwd", "\x00", "x" * 5000, [], {}, [[]], [0, 0],
    [0, 2**62], [2**62, 0], [-8, 0], [1, 2, 3], [65536, 65536, 65536], [0] * 50, [None], ["0", "48"], {"a": {"b": []}},
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    latents = torch.randn(N, 2 * SHAPE[0], *SHAPE[1:]).half()
    about = dict(kind="moments", shift=[0.1, 0.2], scale=[0.3], class_names=["a", "b", "c"], image_size=32,
                 vae={"source": "x"})  # fmt: skip
    write_store(folder / "store", latents, torch.arange(N) % K, K, latents.flip(-1), **about, preprocessing="none")
    return folder / "store"


@pytest.fixture
def bounded():
    """No more than 200 MB of memory, and no more than a minute."""
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000
    assert time.monotonic() - started < 60


def mutate(value, rng):
    """A copy of plain data with one part replaced, removed, doubled or renamed."""
    value = copy.deepcopy(value)
    node, places = value, []
    while isinstance(node, (dict, list)) and node:
        key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        places.append((node, key))
        node = node[key]
    node, key = rng.choice(places)
    kind = rng.random()
    if kind < 0.6:
        old = node[key]
        near = isinstance(old, int) and rng.random() < 0.5
        node[key] = old + rng.choice([-8, -1, 1, 8, 4096, 2**40]) if near else rng.choice(HOSTILE)
    elif kind < 0.75:
        del node[key]
    elif kind < 0.9 or isinstance(node, list):
        other, place = rng.choice(places)
        node[key] = copy.deepcopy(other[place])
    else:
        node[rng.choice(["labels", "moments", "__metadata__", "version", "shape", "x"])] = rng.choice(HOSTILE)
    return value


def split(data):
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(header, body):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def test_fuzzed_shards(folder, bounded):
    """10,000 shards with changed bytes or changed headers: refused, or read as the shapes that the manifest says."""
    manifest = read_manifest(LocalFolder(folder))
    (shard,) = manifest.shards
    data = (folder / shard.file).read_bytes()
    header, body = split(data)
    end = len(data) - len(body)
    rng = random.Random(0)
    refused = 0
    for case in range(10_000):
        if case % 2:
            hostile = join(mutate(header, rng), body)
        else:
            hostile = bytearray(data)
            for _ in range(rng.choice([1, 1, 2, 8])):
                hostile[rng.randrange(end)] = rng.choice([0, 0xFF, rng.randrange(256), *b'0192[]{},:"-'])
            hostile = bytes(hostile[: rng.randrange(end + 64)] if rng.random() < 0.1 else hostile)
        try:
            arrays = parse_shard(hostile, shard, manifest, "x")
        except InputError:
            refused += 1
            continue
        assert arrays.latents.shape == arrays.flipped.shape == (N, 2 * SHAPE[0], *SHAPE[1:])
        arrays.latents.sum(), arrays.flipped.sum(), arrays.labels.sum()  # all of it is within the file
    assert refused > 5000


def test_fuzzed_manifests(folder, bounded, tmp_path):
    """1,500 manifests with changed fields: refused, or a store that opens or is refused in turn."""
    manifest = json.loads((folder / "manifest.json").read_text())
    rng = random.Random(1)
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    refused = 0
    for _ in range(1_500):
        changed = mutate(manifest, rng)
        for _ in range(rng.choice([0, 0, 1])):
            if isinstance(changed, dict) and changed:
                changed = mutate(changed, rng)
        (tmp_path / "manifest.json").write_text(json.dumps(changed))
        try:
            store = LatentStore(tmp_path)
            store.gather(torch.arange(len(store)))
        except InputError:
            refused += 1
    assert 700 < refused < 1500


@pytest.mark.parametrize(
    ("change", "message"),
    {
        "endless side": (dict(shape=[4, 2**60, 1]), "shape"),
        "absurd number of classes": (dict(num_classes=2**40, class_names=None), "num_classes 1099511627776"),
        "not a number": (dict(scale=[float("nan")]), "scale"),
        "no whole version": (dict(version=[]), "version"),
        "shards that are none": (dict(shards=[[]]), "damaged"),
        "a field missing": (dict(shards=None), "damaged"),
    }.values(),
)
def test_impossible_manifests_are_refused_by_field(folder, tmp_path, change, message, bounded):
    manifest = json.loads((folder / "manifest.json").read_text()) | change
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=message):
        read_manifest(LocalFolder(tmp_path))


def test_more_samples_than_the_files_can_hold(folder, tmp_path, bounded):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][0]["num_samples"] = manifest["labels"]["num_samples"] = 10**9
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"1000000000 samples in \d+ bytes of 'shard-00000.safetensors'"):
        LatentStore(tmp_path)


def test_an_absurd_shape(folder, tmp_path, bounded):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    manifest = json.loads((folder / "manifest.json").read_text()) | dict(shape=[65535, 65535, 65535], shift=[0.0])
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"should hold 'moments' of shape \(6, 131070, 65535, 65535\)"):
        LatentStore(tmp_path)


def test_a_shard_listed_twice(folder, tmp_path):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"] *= 2
    manifest["labels"] = None
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="a shard is listed twice"):
        read_manifest(LocalFolder(tmp_path))


def test_arrays_that_overlap(tmp_path):
    latents = torch.zeros(4, 1, 2, 2, dtype=torch.float32)
    shard = write_tensors(
        LocalFolder(tmp_path), "shard-00000.safetensors", {"latents": latents, "labels": torch.arange(4)}
    )
    header, body = split((tmp_path / shard.file).read_bytes())
    manifest = Manifest("latents", (1, 2, 2), 4, [shard])
    assert parse_shard(join(header, body), shard, manifest, "x").labels.tolist() == [0, 1, 2, 3]
    header["labels"]["data_offsets"] = [header["latents"]["data_offsets"][0], header["latents"]["data_offsets"][0] + 32]
    with pytest.raises(InputError, match="contradicts itself"):
        parse_shard(join(header, body), shard, manifest, "x")


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, "1" * 10_000, "\ud800".encode("utf-8", "surrogatepass")]
)
def test_json_that_is_deep_long_or_no_text(tmp_path, text):
    text = text if isinstance(text, bytes) else text.encode()
    (tmp_path / "manifest.json").write_bytes(text)
    with pytest.raises(InputError, match="damaged"):
        read_manifest(LocalFolder(tmp_path))
    with pytest.raises(InputError, match="no readable header"):
        shard = Shard("x", 1, 1, "0" * 64)
        parse_shard(len(text).to_bytes(8, "little") + text, shard, Manifest("latents", (1, 1, 1), 1, [shard]), "x")


def test_folders_and_empty_files_in_place_of_shards(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    shard = tmp_path / "shard-00000.safetensors"
    shard.unlink()
    shard.mkdir()
    with pytest.raises(InputError, match=r"shard-00000.safetensors cannot be read"):
        LatentStore(tmp_path)


@pytest.mark.parametrize("command", ["fit", "sample"])
def test_no_code_in_a_configuration_is_run(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.yaml").write_text("seed_everything: !!python/object/apply:os.mkdir [executed]\n")
    monkeypatch.setattr(sys, "argv", ["ditlit", command, "--config", "evil.yaml"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert not (tmp_path / "executed").exists()
