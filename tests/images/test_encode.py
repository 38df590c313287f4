"""Encoding: the same bytes from any number of processes and after any interruption, and the right ones."""

import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import fsspec
import numpy as np
import pytest
import ranks
import torch
from calls import encode
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny
from PIL import Image

from ditlit.__main__ import main
from ditlit.data.audit import audit
from ditlit.data.store import LatentStore
from ditlit.data.workers import lost_worker
from ditlit.errors import InputError
from ditlit.images.decoding import preprocess
from ditlit.images.sources import open_images
from ditlit.images.vae import Autoencoder, load_decoder

SIZE, PER_CLASS, CLASSES = 16, 9, ("ant", "bee", "cat")
NUM = PER_CLASS * len(CLASSES)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """27 smooth pictures of several sizes, in 3 classes, one of them grey."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for name in CLASSES:
        (root / name).mkdir()
        for i in range(PER_CLASS):
            small = Image.fromarray(generator.integers(0, 256, (5, 5, 3), dtype=np.uint8))
            image = small.resize((20 + 3 * i, 40 - i), Image.Resampling.BICUBIC)
            (image.convert("L") if i == 0 else image).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def kl(tmp_path_factory):
    """A tiny random AutoencoderKL with scaling and shift factors."""
    folder = tmp_path_factory.mktemp("vae")
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), latent_channels=2, norm_num_groups=4, scaling_factor=0.7, shift_factor=0.2,
    )  # fmt: skip
    with torch.no_grad():  # a posterior that is visibly wide
        vae.quant_conv.bias += torch.tensor([0.1, 0.2, -1.0, -2.0])
    vae.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    AutoencoderTiny(
        latent_channels=4, encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), scaling_factor=1.5,
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


def run(images, out, vae, **changes):
    """In this process."""
    settings = dict(image_size=SIZE, batch_size=4, shard_size=10, num_workers=0, precision="32", accelerator="cpu")
    encode(str(images), str(out), vae, **(settings | changes))


def command(images, out, vae, **changes):
    settings = dict(images=images, out=out, vae=vae, image_size=SIZE, batch_size=4, shard_size=2, num_workers=1,
                    accelerator="cpu")  # fmt: skip
    words = [word for key, value in (settings | changes).items() for word in (f"--{key}", str(value))]
    return [sys.executable, "-m", "ditlit", "encode", *words]


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != ".verified.json"}


@pytest.fixture(scope="module")
def kl_store(images, kl, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores") / "kl"
    run(images, folder, kl, dtype="float32")
    return folder


def pictures_of(images):
    """The source of the images and their pictures (n, 3, S, S), in the order of their names."""
    source = open_images(images)
    return source, torch.stack([preprocess(source.read(i), SIZE) for i in range(len(source))])


def test_moments_are_those_of_the_vae_and_scaling_is_that_of_diffusers(images, kl, kl_store):
    store = LatentStore(kl_store)
    source, pictures = pictures_of(images)
    vae = AutoencoderKL.from_pretrained(kl, low_cpu_mem_usage=False).eval()
    order = np.random.default_rng(0).permutation(NUM)  # how encode shuffles
    x = pictures[order].float() / 127.5 - 1
    for flip in (False, True):
        batch = store.gather(torch.arange(NUM), torch.full((NUM,), flip))
        with torch.no_grad():
            posterior = vae.encode(x.flip(-1) if flip else x).latent_dist
        mean, std = batch["moments"].chunk(2, dim=1)
        torch.testing.assert_close(mean, posterior.mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(std, posterior.std, rtol=1e-4, atol=1e-5)
        assert torch.equal(batch["labels"], torch.from_numpy(source.labels[order]))
    manifest = store.manifest
    assert (manifest.shift, manifest.scale, manifest.flipped) == ([0.2], [0.7], True)
    assert manifest.class_names == list(CLASSES) and manifest.shape == (2, 8, 8) and manifest.image_size == SIZE
    assert manifest.vae["class"] == "AutoencoderKL" and audit(kl_store) == []


def test_sampled_latents_have_the_stored_mean_and_std(kl_store, make_module):
    store = LatentStore(kl_store)
    moments = store.gather(torch.zeros(20_000, dtype=torch.long))["moments"]
    module = make_module()
    module.latent_shift, module.latent_scale = torch.full((2, 1, 1), 0.2), torch.full((2, 1, 1), 0.7)
    generator = torch.Generator().manual_seed(0)
    module.denoiser.in_channels, module.denoiser.input_size = 2, (8, 8)
    x0 = module.scaled({"moments": moments}, lambda *shape: torch.randn(len(moments), *shape, generator=generator))
    mean, std = moments[0].chunk(2)
    assert (std > 0.2).all()
    standard_error = 0.7 * std / len(moments) ** 0.5
    assert ((x0.mean(0) - (mean - 0.2) * 0.7).abs() < 5 * standard_error).all()
    torch.testing.assert_close(x0.std(0), 0.7 * std, rtol=0.03, atol=0)


def test_an_autoencoder_without_posterior_and_its_decoder(images, tiny, tmp_path):
    run(images, tmp_path / "s", tiny, flips=False, dtype="float32")
    store = LatentStore(tmp_path / "s")
    _, pictures = pictures_of(images)
    order = np.random.default_rng(0).permutation(NUM)
    vae = AutoencoderTiny.from_pretrained(tiny, low_cpu_mem_usage=False).eval()
    with torch.no_grad():
        latents = vae.encode(pictures[order].float() / 127.5 - 1).latents
        decoded = vae.decode(latents).sample.clamp(-1, 1)
    found = store.gather(torch.arange(NUM))["latents"]
    torch.testing.assert_close(found, latents, rtol=1e-4, atol=1e-5)
    assert store.manifest.scale == [1.5] and not store.manifest.flipped and store.manifest.kind == "latents"
    decode = load_decoder(store.manifest.vae, None, torch.device("cpu"))
    torch.testing.assert_close(decode(found), decoded, rtol=1e-3, atol=1e-4)


def test_a_deep_compression_autoencoder(tmp_path):
    torch.manual_seed(0)
    small = dict.fromkeys(("encoder_block_out_channels", "decoder_block_out_channels"), (8, 8, 8))
    small |= dict.fromkeys(("encoder_layers_per_block", "decoder_layers_per_block"), (1, 1, 1))
    small |= dict.fromkeys(("encoder_block_types", "decoder_block_types"), "ResBlock")
    small |= dict.fromkeys(("encoder_qkv_multiscales", "decoder_qkv_multiscales"), ((), (), ()))
    vae = AutoencoderDC(latent_channels=4, scaling_factor=0.41, **small).eval()
    vae.save_pretrained(tmp_path)
    ours = Autoencoder(str(tmp_path))
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    latents = ours.encode(images)
    assert (ours.kind, ours.scale) == ("latents", [0.41])
    with torch.no_grad():
        torch.testing.assert_close(latents, vae.encode(images.float() / 127.5 - 1).latent, rtol=1e-4, atol=1e-5)
        decoded = vae.decode(latents).sample.clamp(-1, 1)
    torch.testing.assert_close(ours.decode(latents), decoded, rtol=1e-3, atol=1e-4)


def test_pixels_are_stored_as_they_are(images, tmp_path, capsys):
    run(images, tmp_path / "s", "pixels", shuffle=False, flips=False)
    said, _ = capsys.readouterr().out.split("\n", 1)
    assert said == "27 images in 3 classes (ant, bee, cat), by folder; nothing is left out"
    store = LatentStore(tmp_path / "s")
    _, pictures = pictures_of(images)
    found = load_decoder(None, None, torch.device("cpu"))(store.gather(torch.arange(NUM))["latents"])
    assert torch.equal((127.5 * found.float() + 128).to(torch.uint8), pictures)
    assert store.manifest.vae is None and store.labels.tolist() == sorted(store.labels.tolist())


def test_measured_statistics_make_every_channel_standard(images, kl, tmp_path):
    run(images, tmp_path / "s", kl, normalize="channel", dtype="float32")
    store = LatentStore(tmp_path / "s")
    moments = torch.cat([store.gather(torch.arange(NUM), torch.full((NUM,), f))["moments"] for f in (False, True)])
    mean, std = moments.double().chunk(2, dim=1)
    shift, scale = (
        torch.tensor(v, dtype=torch.double)[:, None, None] for v in (store.manifest.shift, store.manifest.scale)
    )
    torch.testing.assert_close(((mean - shift) * scale).mean((0, 2, 3)), torch.zeros(2).double(), rtol=0, atol=1e-9)
    variance = (((mean - shift) ** 2 + std**2) * scale**2).mean((0, 2, 3))  # of a draw from the posterior
    torch.testing.assert_close(variance, torch.ones(2).double(), rtol=1e-9, atol=0)
    about = json.loads((tmp_path / "s" / "summary.json").read_text())
    np.testing.assert_allclose(about["scaled_std"], [1, 1], rtol=1e-9)
    assert about["samples_per_class"] == dict.fromkeys(CLASSES, PER_CLASS)
    assert Image.open(tmp_path / "s" / "contact-sheet.png").size == (8 * SIZE + 9 * 2, 2 * SIZE + 3 * 2)


def test_two_processes_and_workers_write_the_same_bytes_as_one(images, kl, tmp_path):
    run(images, tmp_path / "one", kl, shard_size=4, precision="bf16")
    settings = dict(shard_size=4, devices=2, num_workers=2)
    result = subprocess.run(command(images, tmp_path / "two", kl, **settings), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert len(contents(tmp_path / "one")) == 7 + 5  # shards, labels, manifest, settings, summary, picture


def test_an_encode_that_is_killed_again_and_again_ends_with_the_same_bytes(images, tiny, tmp_path):
    run(images, tmp_path / "whole", tiny, shard_size=2, precision="bf16")
    rng = random.Random(0)
    kills = 0
    for _ in range(60):
        process = subprocess.Popen(
            command(images, tmp_path / "killed", tiny), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        # Wait until it has written a shard more, then some random while, and kill it.
        before = len(list((tmp_path / "killed").glob("shard-*"))) if (tmp_path / "killed").exists() else 0
        while process.poll() is None:
            if len(list((tmp_path / "killed").glob("shard-*"))) > before:
                time.sleep(rng.uniform(0, 0.02))
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.001)
        if process.wait() == 0:
            break
        assert process.returncode == -signal.SIGKILL, process.stderr.read()
        kills += 1
        if kills == int(os.environ.get("DITLIT_KILLS", 2)):
            subprocess.run(command(images, tmp_path / "killed", tiny), check=True, capture_output=True)
            break
    assert kills >= 1
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_broken_images_are_named_and_what_is_written_is_kept(images, tiny, tmp_path, capsys):
    root = tmp_path / "images"
    shutil.copytree(images, root)
    good = (root / "bee" / "3.png").read_bytes()
    (root / "bee" / "3.png").write_bytes(good[:60])
    with pytest.raises(InputError, match=r"1 image cannot be decoded:\n  bee/3.png: .*\nEvery shard without them"):
        run(root, tmp_path / "s", tiny, shard_size=3)
    shards = {name: data for name, data in contents(tmp_path / "s").items() if name.startswith("shard")}
    assert len(shards) == NUM // 3 - 1 and not (tmp_path / "s" / "manifest.json").exists()
    shutil.copytree(tmp_path / "s", tmp_path / "skipped")
    # Left out on request: its shard is one sample shorter.
    run(root, tmp_path / "skipped", tiny, shard_size=3, skip_broken=True)
    assert "bee/3.png" in capsys.readouterr().out
    store = LatentStore(tmp_path / "skipped")
    assert len(store) == NUM - 1 and sorted(s.num_samples for s in store.manifest.shards) == [2, *[3] * 8]
    assert audit(tmp_path / "skipped") == [] and (store.labels == 1).sum() == PER_CLASS - 1
    # Repaired: only the missing shard is made.
    (root / "bee" / "3.png").write_bytes(good)
    run(root, tmp_path / "s", tiny, shard_size=3)
    run(images, tmp_path / "clean", tiny, shard_size=3)
    assert contents(tmp_path / "s") == contents(tmp_path / "clean")


def with_an_unreadable_image(images, folder):
    """What the system, and not the content of a file, keeps from being read."""
    shutil.copytree(images, folder)
    (folder / "bee" / "x.png").symlink_to("/proc/self/mem")
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="needs a file that gives an error to everybody who reads it")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_of_the_system_ends_the_job_and_is_no_broken_image(images, tmp_path, num_workers):
    root = with_an_unreadable_image(images, tmp_path / "images")
    with pytest.raises(InputError, match=r"^cannot read 'bee/x.png': Input/output error. What is written is kept"):
        run(root, tmp_path / "s", "pixels", num_workers=num_workers, skip_broken=True)


@pytest.mark.skipif(sys.platform != "linux", reason="needs a file that gives an error to everybody who reads it")
def test_all_processes_end_when_one_cannot_go_on(images, tmp_path):
    root = with_an_unreadable_image(images, tmp_path / "images")
    words = command(root, tmp_path / "s", "pixels", devices=2)[3:]
    assert sorted(ranks.run(2, words, tmp_path)) == [1, 2]
    log = (tmp_path / "log.txt").read_text()
    reason = "cannot read 'bee/x.png': Input/output error"
    assert f"ditlit: error: {reason}" in log and "Traceback" not in log, log
    assert re.search(rf"rank \d stops because rank \d failed \(InputError: {reason}", log), log


def test_a_killed_worker_is_named_with_the_remedy(images, tmp_path, monkeypatch):
    monkeypatch.setattr("ditlit.images.encoding.preprocess", lambda data, size: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises((InputError, RuntimeError)) as error:  # its signal may come anywhere
        run(images, tmp_path / "s", "pixels", num_workers=1)
    text = str(error.value) if isinstance(error.value, InputError) else lost_worker(error.value)
    assert "was killed, most likely because the memory ran out: lower num_workers" in text


def test_a_store_without_broken_images_is_the_same_to_the_byte_every_time(images, tiny, tmp_path):
    root = tmp_path / "images"
    shutil.copytree(images, root)
    (root / "bee" / "3.png").write_bytes(b"this is no image")
    run(root, tmp_path / "a", tiny, skip_broken=True)
    ballast = [bytearray(100) for _ in range(1000)]  # other addresses
    run(root, tmp_path / "b", tiny, skip_broken=True, num_workers=1)
    assert contents(tmp_path / "a") == contents(tmp_path / "b") and len(ballast) == 1000


def test_names_that_cannot_be_shown_do_not_lose_what_was_done(tmp_path, monkeypatch):
    folder = os.path.join(os.fsencode(tmp_path), b"images", b"caf\xe9")
    try:
        os.makedirs(folder)
    except OSError:
        pytest.skip("names are text here")
    Image.new("RGB", (20, 20)).save(os.fsdecode(os.path.join(folder, b"\xff.png")))
    with open(os.path.join(folder, b"\xfe.png"), "wb"):
        pass
    words = command(tmp_path / "images", tmp_path / "s", "pixels", skip_broken=True, num_workers=0)[2:]
    monkeypatch.setattr(sys, "argv", words)
    stream = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    main()
    stream.flush()
    said = stream.buffer.getvalue()
    assert b"1 class (caf\\xe9)" in said or b"1 class (caf\\udce9)" in said, said
    assert b"1 image cannot be decoded" in said and LatentStore(tmp_path / "s").manifest.class_names == ["caf\\udce9"]


def test_images_that_are_enlarged_are_counted(images, tmp_path, capsys):
    run(images, tmp_path / "s", "pixels", image_size=24)  # shorter sides: 20, 23, 26, 29, 32, 35, 34, 33, 32
    assert "6 images enlarged, whose shorter side has less than 24 pixels" in capsys.readouterr().out
    assert json.loads((tmp_path / "s" / "summary.json").read_text())["enlarged"] == 6
    run(images, tmp_path / "large", "pixels", image_size=20)
    assert "images enlarged" not in capsys.readouterr().out


def test_a_shard_of_broken_images_only(images, tiny, tmp_path):
    root = tmp_path / "images"
    shutil.copytree(images, root)
    for file in (root / "ant").iterdir():
        file.write_bytes(b"")
    run(root, tmp_path / "s", tiny, shard_size=PER_CLASS, shuffle=False, skip_broken=True)
    store = LatentStore(tmp_path / "s")
    assert [s.num_samples for s in store.manifest.shards] == [0, 9, 9] and audit(tmp_path / "s") == []
    assert store.gather(torch.tensor([0, 17]))["labels"].tolist() == [1, 2]


def test_damaged_shards_of_an_earlier_run_are_made_again(images, tiny, tmp_path):
    run(images, tmp_path / "s", tiny)
    whole = contents(tmp_path / "s")
    os.unlink(tmp_path / "s" / "manifest.json")
    os.truncate(tmp_path / "s" / "shard-00001.safetensors", 500)
    run(images, tmp_path / "s", tiny)
    assert contents(tmp_path / "s") == whole


def test_to_a_url(images, tiny, tmp_path):
    run(images, tmp_path / "s", tiny)
    run(images, "memory://encoded", tiny)
    memory = fsspec.filesystem("memory")
    files = {path.rsplit("/", 1)[-1]: memory.cat_file(path) for path in memory.find("/encoded")}
    assert files == contents(tmp_path / "s")


def test_a_store_is_continued_only_as_it_was_begun(images, kl, tiny, tmp_path, capsys):
    run(images, tmp_path / "s", tiny)
    (tmp_path / "fewer.csv").write_text("ant/0.png,ant\nbee/0.png,bee\n")
    for changes, names in (
        (dict(image_size=24), "image_size"),
        (dict(flips=False, dtype="float32"), "flips, dtype"),
        (dict(labels=str(tmp_path / "fewer.csv")), "images"),
    ):
        with pytest.raises(InputError, match=f"begun with other {names}: give the same again"):
            run(images, tmp_path / "s", tiny, **changes)
    with pytest.raises(InputError, match="begun with other vae"):
        run(images, tmp_path / "s", kl)
    shutil.copytree(tiny, tmp_path / "moved")
    capsys.readouterr()
    run(images, tmp_path / "s", str(tmp_path / "moved"))  # the same weights in another place
    assert "complete already" in capsys.readouterr().out
    os.unlink(tmp_path / "s" / "encode.json")
    with pytest.raises(InputError, match="made otherwise"):
        run(images, tmp_path / "s", tiny)


def test_verification_finds_damage(images, tiny, tmp_path, capsys):
    run(images, tmp_path / "s", tiny, dtype="float32")
    encode(verify=str(tmp_path / "s"))
    assert "is whole: 27 samples in 3 shards" in capsys.readouterr().out
    path = tmp_path / "s" / "shard-00002.safetensors"
    data = bytearray(path.read_bytes())
    data[-4:] = np.float32(np.nan).tobytes()
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"is damaged:\n(.*\n)*.*shard-00002.safetensors.*(SHA|checksum)"):
        encode(verify=str(tmp_path / "s"))


def test_mistakes(images, tiny, tmp_path):
    with pytest.raises(InputError, match="encode needs --out"):
        encode(images=str(images))
    with pytest.raises(InputError, match="cannot load the VAE 'nowhere'"):
        run(images, tmp_path / "s", "nowhere")
    with pytest.raises(InputError, match="batch_size must be positive, got 0"):
        run(images, tmp_path / "s", tiny, batch_size=0)
    assert not (tmp_path / "s").exists()
    for inside in (images, images / "ant" / "store"):
        with pytest.raises(InputError, match=f"--out {inside} lies in {images}, among the images to encode; choose"):
            run(images, inside, tiny)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot write to .*file/s: Not a directory; choose another place with --out"):
        run(images, tmp_path / "file" / "s", tiny)
    other = Autoencoder(tiny)
    with pytest.raises(InputError, match="is not the one that encoded this store"):
        load_decoder(other.entry | {"hash": "0" * 64}, None, torch.device("cpu"))
