"""The latent store: round trips, batched reading, and damage of every kind."""

import json
import os
import pickle

import numpy as np
import pytest
import torch

from ditlit.data.audit import audit
from ditlit.data.folders import open_folder
from ditlit.data.manifest import Manifest
from ditlit.data.shards import write_shard
from ditlit.data.store import LatentStore, finish_store, write_store
from ditlit.errors import InputError

N, C, H, W, K = 23, 2, 4, 6, 5
VAE = {"source": "x"}


def arrays(dtype=torch.float16, kind="latents", seed=0):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(N, 2 * C if kind == "moments" else C, H, W, generator=generator).to(dtype)
    return latents, torch.arange(N) % K


@pytest.fixture
def folder(tmp_path):
    latents, labels = arrays()
    write_store(tmp_path / "store", latents, labels, K, shard_size=8, vae=VAE)
    return tmp_path / "store"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["latents", "moments"])
def test_round_trip(tmp_path, dtype, kind):
    latents, labels = arrays(dtype, kind)
    flipped, _ = arrays(dtype, kind, seed=1)
    about = dict(class_names=list("abcde"), image_size=48, vae={"source": "x"}, shift=[0.1], scale=[0.2, 0.3])
    store = write_store(tmp_path, latents, labels, K, flipped, kind, shard_size=8, **about)
    assert [shard.num_samples for shard in store.manifest.shards] == [8, 8, 7]
    assert store.manifest.shape == (C, H, W) and store.manifest.vae == {"source": "x"}
    assert store.manifest.scale == [0.2, 0.3] and store.manifest.class_names == list("abcde")
    index = torch.tensor([22, 0, 8, 7, 15, 16, 0])
    flip = torch.tensor([True, False, True, False, False, True, True])
    batch = store.gather(index, flip)
    expected = torch.where(flip[:, None, None, None], flipped[index], latents[index])
    assert batch[kind].dtype == dtype and torch.equal(batch[kind], expected)
    assert torch.equal(batch["labels"], labels[index])


def test_flips_of_a_store_without_mirrored_encodings(folder):
    latents, _ = arrays()
    batch = LatentStore(folder).gather(torch.tensor([3, 9]), torch.tensor([False, True]))
    assert torch.equal(batch["latents"], torch.stack([latents[3], latents[9].flip(-1)]))


def test_items_are_samples_by_number_slice_and_numbers(folder):
    latents, labels = arrays()
    store = LatentStore(folder)
    assert len(store) == N
    one = store[3]
    assert torch.equal(one["latents"], latents[3]) and one["labels"] == labels[3]
    for index in (-1, slice(2, 20, 5), slice(5, 5), [4, -2, 4], torch.tensor([0, 22]), []):
        batch = store[index]
        assert torch.equal(batch["latents"], latents[index]), index
        assert torch.equal(batch["labels"], labels[index]), index
    assert sum(1 for _ in store) == N
    for index in (N, -N - 1, [0, N]):
        with pytest.raises(IndexError, match=r"has the samples 0\.\.22"):
            store[index]
    for index in (0.5, [True, False], torch.zeros(2, 2)):
        with pytest.raises(TypeError, match="a number, a slice or a sequence"):
            store[index]


def test_a_store_says_what_it_is(folder, tmp_path):
    assert repr(LatentStore(folder)) == f"LatentStore('{folder}': 23 latents 2 x 4 x 6 of x, 5 classes)"
    store = write_store(tmp_path / "s", *arrays(kind="moments"), K, kind="moments", vae={"source": "some/vae"})
    assert repr(store).endswith("23 moments 2 x 4 x 6 of some/vae, 5 classes)")


def test_gathered_batches_can_be_changed_without_touching_the_store(folder):
    store = LatentStore(folder)
    before = store.gather(torch.arange(N))["latents"].clone()
    store.gather(torch.arange(N))["latents"].zero_()
    assert torch.equal(store.gather(torch.arange(N))["latents"], before)


def test_writing_is_deterministic_and_leaves_no_temporary_files(folder, tmp_path):
    latents, labels = arrays()
    write_store(tmp_path / "again", latents, labels, K, shard_size=8, vae=VAE)
    for file in sorted(os.listdir(folder)):
        assert (folder / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    files = ["labels.safetensors", "manifest.json", *(f"shard-{i:05d}.safetensors" for i in range(3))]
    assert sorted(os.listdir(folder)) == files


def test_verification_is_remembered_until_a_file_changes(folder):
    store = LatentStore(folder)
    store.verify()
    change(folder / "shard-00001.safetensors", -200)
    with pytest.raises(InputError, match=r"shard-00001.safetensors is corrupt: its SHA-256"):
        LatentStore(folder).verify()


def change(path, place):
    """Change one byte, or those of a slice to ones."""
    data = bytearray(path.read_bytes())
    if isinstance(place, slice):
        data[place] = b"\xff" * len(data[place])
    else:
        data[place] ^= 1
    path.write_bytes(data)


def edit_manifest(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def point_outside(folder, name, field="file"):
    content = json.loads((folder / "manifest.json").read_text())
    content["shards"][0][field] = name
    edit_manifest(folder, shards=content["shards"])


DAMAGE = {
    "no folder": (lambda f: f.rename(f.with_name("gone")), "no latent store at .*the folder does not exist"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "has no manifest.json"),
    "unreadable manifest": (lambda f: (f / "manifest.json").write_text("{"), "manifest.json is damaged"),
    "not a manifest": (lambda f: (f / "manifest.json").write_text("[]"), "manifest.json is damaged"),
    "another version": (lambda f: edit_manifest(f, version=99), "has format version 99"),
    "missing fields": (lambda f: edit_manifest(f, shards=[{}]), "manifest.json is damaged"),
    "no samples": (lambda f: edit_manifest(f, shards=[]), "manifest.json is damaged"),
    "bad scale": (lambda f: edit_manifest(f, scale=[1, 2, 3]), "manifest.json is damaged"),
    "parent folder": (lambda f: point_outside(f, "../shard-00000.safetensors"), "leads out of its folder"),
    "absolute path": (lambda f: point_outside(f, "/etc/passwd"), "leads out of its folder"),
    "no checksum": (lambda f: point_outside(f, "../x", "sha256"), "manifest.json is damaged .the checksum of"),
    "missing labels": (lambda f: (f / "labels.safetensors").unlink(), "labels.safetensors is missing"),
    "changed labels": (lambda f: change(f / "labels.safetensors", -3), "labels.safetensors is corrupt: its SHA-256"),
    "other class names": (lambda f: edit_manifest(f, class_names=["a"]), "manifest.json is damaged"),
    "missing shard": (lambda f: (f / "shard-00001.safetensors").unlink(), "shard-00001.safetensors is missing"),
    "truncated shard": (
        lambda f: os.truncate(f / "shard-00001.safetensors", 300),
        r"shard-00001.safetensors has 300 bytes where the manifest says",
    ),
    "corrupt header": (
        lambda f: (f / "shard-00002.safetensors").write_bytes(b"\xff" * (f / "shard-00002.safetensors").stat().st_size),
        "shard-00002.safetensors is corrupt: it has no readable header",
    ),
    "labels out of range": (lambda f: edit_manifest(f, num_classes=3), r"labels run from 0 to 4.* in 0..2"),
    "other shape": (lambda f: edit_manifest(f, shape=[C, H, 8]), r"should hold 'latents' of shape \(8, 2, 4, 8\)"),
    "other kind": (lambda f: edit_manifest(f, kind="moments"), "should hold 'moments'"),
    "no flips": (lambda f: edit_manifest(f, flipped=True), "should hold 'flipped_latents'"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found_on_opening(folder, damage):
    inflict, message = DAMAGE[damage]
    inflict(folder)
    with pytest.raises(InputError, match=message):
        LatentStore(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(labels=torch.full((N,), K)), r"labels run from 5 to 5, but must lie in 0..4"),
        (dict(labels=torch.full((N,), -1)), "labels run from -1"),
        (dict(labels=torch.zeros(3)), r"need latents \(n, C, H, W\) and labels \(n,\)"),
        (dict(latents=torch.full((N, C, H, W), torch.nan)), "latents hold NaN or Inf"),
        (dict(latents=torch.zeros(N, 3, H, W), kind="moments"), "even number of channels"),
        (dict(flipped=torch.zeros(N, C, H, 1)), "must have the shape"),
        (dict(flipped=torch.full((N, C, H, W), torch.inf)), "flipped latents hold NaN or Inf"),
        (dict(latents=np.full((N, C, H, W), 1e300)), "latents hold NaN or Inf"),
        (dict(latents=np.zeros((N, 3, H, W), np.uint8)), r"latents are uint8, .* as x / 127.5 - 1"),
        (dict(latents=np.zeros((N, C, H, W), complex)), "latents are complex128"),
        (dict(latents=[[1.0], [1.0, 2.0]]), "latents are no array of numbers"),
        (dict(labels=["ant"] * N), "labels are no array of numbers"),
        (dict(labels=torch.full((N,), 0.5)), "labels are no whole numbers"),
        (dict(labels=torch.eye(N).long()), r"need latents \(n, C, H, W\) and labels \(n,\)"),
        (dict(num_classes="5"), "cannot have num_classes '5'"),
        (dict(shard_size=0), "shard_size must be positive"),
        (dict(kind="moment"), "cannot have kind 'moment'"),
        (dict(scale=[1.0, 2.0, 3.0]), r"cannot have scale \[1.0, 2.0, 3.0\]"),
        (dict(shift=np.nan), r"cannot have shift \[nan\]"),
        (dict(scale="big"), "the scale are no array of numbers"),
        (dict(clas_names=list("abcde")), "no field 'clas_names'; did you mean class_names"),
        (dict(class_names=list("abcd")), "class_names other than a name for each of 5 classes"),
        (dict(class_names=range(5)), "class_names"),
        (dict(image_size=(48, 48)), r"cannot have image_size \(48, 48\)"),
        (dict(vae=None), "latents of 2 channels are no pixels: name the VAE"),
        (dict(vae="stabilityai/sd-vae-ft-ema"), "cannot have vae 'stabilityai/sd-vae-ft-ema'"),
        (dict(vae={"class": "AutoencoderKL"}), "vae names no source"),
        (dict(vae={"source": "x", "hash": b"x"}), "cannot have these fields"),
    ],
)
def test_bad_arrays_are_refused_and_nothing_is_written(tmp_path, changes, message):
    latents, labels = arrays()
    given = dict(latents=latents, labels=labels, num_classes=K, vae=VAE) | changes
    with pytest.raises(InputError, match=message):
        write_store(tmp_path / "store", **given)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    "given",
    [
        lambda latents, labels: (latents.numpy(), labels.numpy().astype(np.uint8), np.int64(K)),
        lambda latents, labels: (latents.numpy().astype(">f4"), labels.numpy().astype(">i2"), K),
        lambda latents, labels: (latents.numpy().copy()[:, :, ::-1][:, :, ::-1], labels.double(), K),
        lambda latents, labels: (latents.double().tolist(), labels.tolist(), K),
        lambda latents, labels: (list(latents), list(labels), torch.tensor(K)),
        lambda latents, labels: (latents.double().requires_grad_(), labels.to(torch.uint16), K),
        lambda latents, labels: (np.broadcast_to(latents.numpy(), latents.shape), tuple(labels.int().numpy()), K),
    ],
)
def test_any_array_of_numbers_will_do(tmp_path, given, recwarn):
    latents, labels = arrays(torch.float32)
    about = dict(scale=0.18215, shift=np.float32([0.5, 0.25]), class_names=tuple("abcde"), image_size=np.int32(48))
    store = write_store(tmp_path, *given(latents, labels), vae=VAE, **about)
    batch = store.gather(torch.arange(N))
    assert batch["latents"].dtype == torch.float32 and torch.equal(batch["latents"], latents)
    assert torch.equal(batch["labels"], labels) and not recwarn.list
    about = store.manifest
    assert (about.scale, about.shift, about.class_names) == ([0.18215], [0.5, 0.25], list("abcde"))
    assert about.num_classes == K and about.image_size == 48


def test_images_are_not_taken_for_a_store(tmp_path):
    (tmp_path / "images" / "ant").mkdir(parents=True)
    for path in (tmp_path / "images" / "ant" / "1.JPEG", tmp_path / "images.tar"):
        path.touch()
    for place in ("images", "images/ant", "images.tar"):
        with pytest.raises(InputError, match=f"{place} holds images and is no latent store; encode them first, with"):
            LatentStore(tmp_path / place)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty is not a latent store: it has no manifest.json"):
        LatentStore(tmp_path / "empty")


def test_a_store_is_not_written_over(folder):
    with pytest.raises(InputError, match="already holds a latent store"):
        write_store(folder, *arrays(), K)


def test_shards_may_be_empty(tmp_path):
    latents, labels = arrays()
    folder = open_folder(tmp_path)
    parts = [slice(0, 0), slice(0, 9), slice(9, 9), slice(9, N), slice(N, N)]
    shards = [
        write_shard(folder, number, {"latents": latents[part], "labels": labels[part]}, {"number": str(number)})
        for number, part in enumerate(parts)
    ]
    finish_store(folder, Manifest("latents", (C, H, W), K, shards), labels)
    index = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    batch = LatentStore(tmp_path).gather(index)
    assert torch.equal(batch["latents"], latents[index]) and torch.equal(batch["labels"], labels[index])
    assert audit(tmp_path) == []


def test_a_store_is_finished_only_with_its_own_labels(tmp_path):
    latents, labels = arrays()
    folder = open_folder(tmp_path)
    manifest = Manifest("latents", (C, H, W), K, [write_shard(folder, 0, {"latents": latents, "labels": labels})])
    with pytest.raises(InputError, match="has 23 samples in shards, 22 labels"):
        finish_store(folder, manifest, labels[1:])
    with pytest.raises(InputError, match="labels run from 1 to 5"):
        finish_store(folder, manifest, labels + 1)
    assert "manifest.json" not in folder.names()


def test_older_stores_have_their_labels_in_the_shards_alone(folder):
    (folder / "labels.safetensors").unlink()
    content = json.loads((folder / "manifest.json").read_text())
    del content["labels"]
    (folder / "manifest.json").write_text(json.dumps(content))
    assert torch.equal(LatentStore(folder).labels, arrays()[1])
    assert audit(folder) == []
    edit_manifest(folder, num_classes=3)
    with pytest.raises(InputError, match=r"labels run from 0 to 4.* in 0..2"):
        LatentStore(folder)


def test_another_process_opens_the_store_instead_of_copying_it(folder):
    data = pickle.dumps(LatentStore(folder))
    assert len(data) < 300
    assert torch.equal(pickle.loads(data).gather(torch.arange(N))["latents"], arrays()[0])


def test_an_audit_collects_everything_that_is_wrong(tmp_path):
    latents, labels = arrays()
    flipped, _ = arrays(seed=1)
    write_store(tmp_path, latents, labels, K, flipped, shard_size=5, vae=VAE)
    assert audit(tmp_path) == []
    shards = [tmp_path / f"shard-{i:05d}.safetensors" for i in range(5)]
    last = C * H * W * 2  # bytes of a sample
    content = shards[0].read_bytes()
    first = content.index(latents[0].numpy().tobytes())
    change(shards[0], slice(first, first + 6))  # three NaN
    change(shards[1], shards[1].read_bytes().index(flipped[5].numpy().tobytes()) + last - 2)
    shards[2].unlink()
    os.truncate(shards[3], 100)
    change(shards[4], content.index(labels[:5].numpy().tobytes()))  # label 0 becomes 1
    problems = audit(tmp_path)
    expected = [
        r"shard-00000.safetensors is corrupt: its SHA-256",
        r"shard-00000.safetensors: 3 of 240 numbers in latents are NaN or Inf",
        r"shard-00001.safetensors is corrupt: its SHA-256",
        r"shard-00002.safetensors is missing",
        r"shard-00003.safetensors has 100 bytes where the manifest says",
        r"shard-00004.safetensors is corrupt: its SHA-256",
        r"shard-00004.safetensors: 1 of 3 labels differ from those in labels.safetensors",
    ]
    assert len(problems) == len(expected)
    assert all(text in problem for text, problem in zip(expected, problems, strict=True))


def test_an_audit_finds_labels_out_of_range_and_mixed_types(tmp_path):
    folder = open_folder(tmp_path)
    latents, labels = arrays()
    shards = [write_shard(folder, i, {"latents": latents.to(t), "labels": labels + 2 * i})
              for i, t in enumerate((torch.float16, torch.bfloat16))]  # fmt: skip
    finish_store(folder, Manifest("latents", (C, H, W), K, shards), torch.cat([labels, labels]))
    problems = audit(tmp_path)
    assert len(problems) == 3
    assert "shard-00001.safetensors: labels run from 2 to 6, but must lie in 0..4" in problems[0]
    assert "23 of 23 labels differ" in problems[1]
    assert "torch.float16 in shard-00000.safetensors, torch.bfloat16 in shard-00001.safetensors" in problems[2]
