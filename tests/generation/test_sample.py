"""Sampling from checkpoints: repeatable whatever the batch, the devices or the interruptions."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partialmethod

import numpy as np
import pytest
import torch
from calls import evaluate_loss, sample
from lightning.pytorch import Trainer
from PIL import Image
from safetensors.torch import load_file
from weights import PIXELS, contents_of, released, scrambled

import ditlit
from ditlit import checkpoints
from ditlit.checkpoints.safetensors_files import write_safetensors
from ditlit.data import LatentDataModule, write_store
from ditlit.data.classes import parse_classes
from ditlit.data.store import per_channel
from ditlit.diffusion import GaussianDiffusion, Sampling, draw_samples
from ditlit.diffusion.noise import normal, sample_generators
from ditlit.diffusion.sampling import check_finite
from ditlit.errors import InputError
from ditlit.generation.classes import plan_labels
from ditlit.generation.onednn import FusedMLP, fuse, supported
from ditlit.generation.pipeline import SamplingPipeline, enough_memory
from ditlit.generation.sheets import slerp
from ditlit.images.vae import weights_hash
from ditlit.models import DiT
from ditlit.models.embeddings import TimestepEmbedding
from ditlit.pictures import HEADER, PADDING, read_png, to_uint8
from ditlit.training import EMA, DiTModule

NAMES = ["tench, Tinca tinca", "goldfish", "white shark", "ray", "cock"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny DiT with random weights everywhere, saved after one step of training on pixels."""
    folder = tmp_path_factory.mktemp("checkpoint")
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(10, 3, 8, 8, generator=generator) * 2 - 1
    write_store(folder / "store", pixels, torch.arange(10) % 5, 5, class_names=NAMES, image_size=8, shift=[0.1],
                scale=[1.5])  # fmt: skip
    torch.manual_seed(0)
    denoiser = DiT(input_size=8, in_channels=3, num_classes=5, patch_size=4, hidden_size=16, depth=2, num_heads=2)
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    module = DiTModule(denoiser, ema=EMA(0.9, warmup=False))
    trainer = Trainer(accelerator="cpu", devices=1, max_steps=1, logger=False, enable_checkpointing=False,
                      enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder)  # fmt: skip
    trainer.fit(module, LatentDataModule(str(folder / "store"), global_batch_size=10))
    trainer.save_checkpoint(folder / "x.ckpt")
    return str(folder / "x.ckpt")


def draw(checkpoint, out, **changes):
    settings = dict(num_steps=4, batch_size=4, per_class=3, accelerator="cpu")
    sample(checkpoint, str(out), **(settings | changes))


def images(folder):
    return {path.name: path.read_bytes() for path in (folder / "images").glob("*.png")}


def pixels(folder):
    return torch.stack([read_png(path) for path in sorted((folder / "images").glob("*.png"))])


def test_what_is_drawn_is_what_the_sampler_gives(checkpoint, tmp_path):
    draw(checkpoint, tmp_path, classes="3,1", save="npz,latents", batch_size=6)
    loaded = checkpoints.load(checkpoint)
    labels = torch.tensor([3, 3, 3, 1, 1, 1])
    settings = Sampling("ddpm", 4, guidance_scale=4.0)
    with torch.no_grad():
        x0 = draw_samples(settings, loaded.process, loaded.denoiser, (3, 8, 8), labels, 5, range(6), seed=0)
    raw = x0 / 1.5 + per_channel([0.1], 3)
    difference = (pixels(tmp_path).int() - to_uint8(raw.clamp(-1, 1)).int()).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() < 0.01  # rounded otherwise on the way
    kept = load_file(tmp_path / "latents" / "000000-000005.safetensors")
    torch.testing.assert_close(kept["latents"], raw, rtol=2e-3, atol=2e-3)
    assert torch.equal(kept["labels"], labels)
    with np.load(tmp_path / "samples.npz") as archive:
        assert archive["arr_0"].dtype == np.uint8 and archive["arr_0"].shape == (6, 8, 8, 3)
        assert np.array_equal(archive["arr_0"], pixels(tmp_path).permute(0, 2, 3, 1).numpy())
        assert archive["arr_1"].tolist() == labels.tolist()
    lines = (tmp_path / "images" / "labels.csv").read_text().splitlines()
    assert lines[:2] == ["file,label", "000000.png,3"] and len(lines) == 7
    job = json.loads((tmp_path / "sample.json").read_text())
    assert job["checkpoint"] == weights_hash(checkpoints.load(checkpoint).denoiser) and job["weights"] == "ema"
    assert Image.open(tmp_path / "grid.png").size == (3 * 66 + 2, 2 * 66 + 2)  # a row for each class, enlarged


def test_python_draws_what_the_command_draws(checkpoint, tmp_path, capsys):
    """By names, numbers or labels; what is loaded stays as it was, whatever is drawn."""
    draw(checkpoint, tmp_path, classes="3,1", sampler="ddim", guidance_scale=2.0, seed=7)
    step, how = "moving average of the weights of step 1", "ddim, 4 steps, guidance 2; precision 32, cpu"
    assert f"Drawing with the {step}: {how}\n" in capsys.readouterr().out
    model = ditlit.load(checkpoint, device="cpu")
    before = weights_hash(model.denoiser)
    sampling = ditlit.Sampling(num_steps=4, guidance_scale=2.0)
    numbers = [3, 3, 3, 1, 1, 1]
    labels = (torch.tensor(numbers), torch.tensor(numbers, dtype=torch.uint8), np.array(numbers))
    for classes in (["ray"] * 3 + ["goldfish"] * 3, [3, 3, 3, "1", 1, 1], *labels):
        drawn = model.sample(classes, sampling, seed=7, batch_size=4)
        assert torch.equal(drawn, pixels(tmp_path))
    assert model.sample_latents(torch.tensor([3]), sampling).shape == (1, 3, 8, 8)
    assert len(model.sample_latents(range(5), sampling)) == 5
    assert weights_hash(model.denoiser) == before and type(model.denoiser.time_embed) is TimestepEmbedding
    sizes = "depth 2, hidden_size 16, num_heads 2, patch_size 4"
    assert repr(model) == f"Model({sizes}, 5 classes, ema weights of step 1)" and model.class_names == NAMES
    for classes, said in (
        ("rey", "names like it are ray"),
        (torch.tensor([5]), "labels lie in 0..4"),
        (np.array([-1]), "labels lie in 0..4"),
        (torch.tensor([0.5]), "no whole numbers"),
        (torch.tensor(3), r"one for each image; got an array of shape \(\)"),
        (torch.zeros(2, 2, dtype=torch.long), r"one for each image; got an array of shape \(2, 2\)"),
        (torch.tensor([], dtype=torch.long), r"one for each image; got an array of shape \(0,\)"),
        ([], "no class is named"),
    ):
        with pytest.raises(InputError, match=said):
            model.sample(classes, sampling)
    with pytest.raises(InputError, match="batch_size must be positive, got 0"):
        model.sample([3], sampling, batch_size=0)


def test_python_is_told_of_mistakes_before_anything_is_drawn(tmp_path, monkeypatch):
    path = tmp_path / "released.pt"
    torch.save(released(scrambled()), path)
    for source, settings, said in (
        (tmp_path / "nothing.ckpt", {}, "there is no checkpoint"),
        (path, {"weights": "online"}, "weights are 'ema' or 'raw', got 'online'"),
        (path, {"precision": "bf8"}, "precision is one of 32, tf32, bf16, fp16, got 'bf8'"),
        (path, {"precision": "fp16"}, "fp16 is for GPUs"),
        (path, {}, "give num_heads"),
    ):
        with pytest.raises(InputError, match=said):
            ditlit.load(source, device="cpu", **settings)
    model = ditlit.load(path, device="cpu", num_heads=4, vae=str(tmp_path / "nowhere"))
    assert repr(model) == "Model(depth 2, hidden_size 48, num_heads 4, patch_size 2, 7 classes, weights)"
    monkeypatch.setattr(SamplingPipeline, "draw", lambda *args: pytest.fail("drew without a VAE"))
    with pytest.raises(InputError, match="nowhere"):
        model.sample([1])


def test_importing_ditlit_imports_no_torch_and_offers_what_programs_use():
    code = (
        "import sys, ditlit\n"
        "assert 'torch' not in sys.modules and {'load', 'DiT', '__version__'} <= set(dir(ditlit))\n"
        "assert all(getattr(ditlit, name) for name in ditlit.__all__)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        _ = ditlit.lod


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "unipc"])
def test_a_picture_does_not_depend_on_its_batch(tmp_path, sampler):
    """But by float32's rounding, which no sampler amplifies: other batches may take other kernels of the CPU's.

    The weights are of the size that such networks have: with larger ones a network is chaotic, and no bound holds.
    """
    checkpoint = tmp_path / "x.safetensors"
    write_safetensors(contents_of(scrambled(in_channels=3, num_classes=5), latents=PIXELS), checkpoint)
    found, latents = [], []
    for size in (1, 7, 64):
        out = tmp_path / str(size)
        draw(checkpoint, out, num_samples=24, labels="random", sampler=sampler, batch_size=size, save="latents")
        found.append(pixels(out).int())
        latents.append(torch.cat([load_file(path)["latents"] for path in sorted((out / "latents").iterdir())]))
    for other, values in zip(found[1:], latents[1:], strict=True):
        assert (values - latents[0]).abs().max() <= 1e-5 * latents[0].std()  # measured: 2e-6
        difference = (other - found[0]).abs()
        assert difference.max() <= 1 and (difference > 0).float().mean() <= 0.001
    assert (found[0][0] != found[0][1]).any()
    draw(checkpoint, tmp_path / "fewer", num_samples=5, labels="random", sampler=sampler, batch_size=1)
    assert torch.equal(pixels(tmp_path / "fewer").int(), found[0][:5])
    draw(checkpoint, tmp_path / "seed", num_samples=5, labels="random", sampler=sampler, batch_size=1, seed=1)
    assert not torch.equal(pixels(tmp_path / "seed").int(), found[0][:5])


def test_two_processes_and_a_killed_job_make_the_same_bytes(checkpoint, tmp_path):
    draw(checkpoint, tmp_path / "one", num_samples=18, save="latents")
    settings = dict(ckpt=checkpoint, num_steps=4, batch_size=4, num_samples=18, accelerator="cpu", save="latents")
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "ditlit", "sample", *words]
    result = subprocess.run(
        [*command, "--devices", "2", "--out", str(tmp_path / "two")], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert images(tmp_path / "one") == images(tmp_path / "two") and len(images(tmp_path / "one")) == 18
    # As a kill leaves it: some images of a batch, and none of others.
    whole = images(tmp_path / "two")
    kept = tmp_path / "two" / "images" / "000000.png"
    for i in (5, 6, 16):
        os.unlink(tmp_path / "two" / "images" / f"{i:06d}.png")
    os.unlink(tmp_path / "two" / "latents" / "000016-000017.safetensors")
    before = {name: (tmp_path / "two" / "images" / name).stat().st_mtime_ns for name in images(tmp_path / "two")}
    draw(checkpoint, tmp_path / "two", num_samples=18, save="latents")
    assert images(tmp_path / "two") == whole and kept.exists()
    after = {name: (tmp_path / "two" / "images" / name).stat().st_mtime_ns for name in before}
    assert after == before  # only what was missing was written
    latents = sorted(path.read_bytes() for path in (tmp_path / "two" / "latents").iterdir())
    assert latents == sorted(path.read_bytes() for path in (tmp_path / "one" / "latents").iterdir())


def test_a_folder_is_continued_only_with_the_same_job(checkpoint, tmp_path):
    draw(checkpoint, tmp_path)
    for changes, names in (
        (dict(seed=1), "seed"),
        (dict(weights="raw"), "checkpoint, weights"),
        (dict(guidance_scale=1.0), "sampling"),
        (dict(classes="1"), "classes, num_samples"),
    ):
        with pytest.raises(InputError, match=f"asked for with other {names};"):
            draw(checkpoint, tmp_path, **changes)
    os.unlink(tmp_path / "sample.json")
    with pytest.raises(InputError, match="holds images of something else"):
        draw(checkpoint, tmp_path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler
def test_precisions_and_compiling_change_little(checkpoint, monkeypatch):
    # Tracing is ours to test, what the compiler's backend makes of it is not.
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="eager"))
    labels, indices = torch.tensor([0, 1, 2, 3]), range(4)

    def latents(**settings):
        loaded = checkpoints.load(checkpoint)
        cpu = torch.device("cpu")
        sampling = Sampling("ddim", 4, guidance_scale=1.5)
        return SamplingPipeline(loaded.denoiser, loaded.process, loaded.latents, sampling, 0, cpu, **settings).draw(
            indices, labels
        )

    exact = latents()
    scale = exact.std()
    assert (latents(precision="bf16") - exact).pow(2).mean().sqrt() < 0.03 * scale
    torch.testing.assert_close(latents(precision="tf32"), exact)
    torch.testing.assert_close(latents(compile=True), exact, rtol=1e-3, atol=1e-3)


def cells(path, rows, columns):
    """Pictures (rows, columns, 3, 8, 8) of a sheet, reduced to their own size again."""
    sheet = read_png(path)[:, HEADER:]
    side = 64 + PADDING
    assert sheet.shape[1:] == (rows * side + PADDING, columns * side + PADDING)
    return torch.stack(
        [
            torch.stack([sheet[:, r * side + PADDING :, c * side + PADDING :][:, :64:8, :64:8] for c in range(columns)])
            for r in range(rows)
        ]
    )


def near(a, b):
    difference = (a.int() - b.int()).abs()
    return bool(difference.max() <= 1)


def test_sheets(checkpoint, tmp_path):
    draw(checkpoint, tmp_path, classes="goldfish,ray", sheet="guidance", sheet_scales="1,3")
    sheet = cells(tmp_path / "sheet-guidance.png", 2, 2)
    for column, scale in enumerate((1.0, 3.0)):
        draw(checkpoint, tmp_path / str(column), classes="1,3", per_class=1, guidance_scale=scale)
        assert near(sheet[:, column], pixels(tmp_path / str(column)))
    settings = dict(sampler="ddim", sheet_columns=3)
    draw(checkpoint, tmp_path, classes="1,3", sheet="noise", **settings)
    noises = cells(tmp_path / "sheet-noise.png", 2, 3)
    draw(checkpoint, tmp_path, classes="1,3,0", sheet="classes", **settings)
    between = cells(tmp_path / "sheet-classes.png", 2, 3)
    drawn = {}
    for classes in ("1", "3"):
        draw(checkpoint, tmp_path / f"d{classes}", classes=classes, per_class=4, sampler="ddim")
        drawn[classes] = pixels(tmp_path / f"d{classes}")
    assert near(noises[0, 0], drawn["1"][0]) and near(noises[0, -1], drawn["1"][2])  # from noise 0 to noise 2
    assert near(noises[1, 0], drawn["3"][1]) and near(noises[1, -1], drawn["3"][3])
    assert near(between[0, 0], drawn["1"][0]) and near(between[0, -1], drawn["3"][0])
    assert near(between[1, 0], drawn["3"][1]) and not near(between[0, 1], between[0, 0])
    with pytest.raises(InputError, match="needs at least two of them"):
        draw(checkpoint, tmp_path, classes="1", sheet="classes")


def test_interpolated_noise_stays_as_long_as_noise():
    a, b = normal((3, 32, 32), sample_generators(0, range(4))).chunk(2)
    assert torch.allclose(slerp(a, b, 0.0), a, atol=1e-5) and torch.allclose(slerp(a, b, 1.0), b, atol=1e-5)
    assert torch.allclose(slerp(a, b, 0.5).std((1, 2, 3)), torch.ones(2), atol=0.05)


def test_the_denoising_as_an_animation(checkpoint, tmp_path):
    draw(checkpoint, tmp_path, save_steps=2, num_steps=8)
    with Image.open(tmp_path / "denoising.webp") as animation:
        assert animation.n_frames == 5  # steps 0, 2, 4, 6 and the last
        animation.seek(4)
        last = np.asarray(animation.convert("RGB")).astype(int)
    final = pixels(tmp_path)[:4]
    shown = last[2:66, 2:66]  # the first picture, enlarged eight times
    expected = np.kron(final[0].permute(1, 2, 0).numpy(), np.ones((8, 8, 1)))
    assert np.abs(shown - expected).mean() < 20  # WebP loses a little
    os.unlink(tmp_path / "denoising.webp")
    draw(checkpoint, tmp_path, save_steps=2, num_steps=8)
    assert (tmp_path / "denoising.webp").exists()


def test_classes_by_number_and_by_name():
    assert parse_classes("4, goldfish,TENCH,tinca tinca", 5, NAMES) == [4, 1, 0, 0]
    assert parse_classes("7", 10, None) == [7]
    assert parse_classes("3", 5, ["0", "1", "2", "4", "3"]) == [4]  # a class that is called 3
    with pytest.raises(InputError, match=r"no class 'golfish'; names like it are goldfish"):
        parse_classes("golfish", 5, NAMES)
    with pytest.raises(InputError, match="no class 5: this model knows classes 0 to 4"):
        parse_classes("5", 5, NAMES)
    with pytest.raises(InputError, match="this model knows no names"):
        parse_classes("ray", 5, None)


def test_labels_of_many_samples():
    assert plan_labels([4, 2], None, 2, "balanced", 0).tolist() == [4, 4, 2, 2]
    assert plan_labels([4, 2, 9], 7, 1, "balanced", 0).tolist() == [4, 2, 9, 4, 2, 9, 4]
    random = plan_labels(range(10), 20_000, 1, "random", 0)
    assert torch.equal(random[:50], plan_labels(range(10), 50, 1, "random", 0))
    assert not torch.equal(random[:50], plan_labels(range(10), 50, 1, "random", 1))
    for distance in (1, 2, 3):  # neighbours know nothing of each other
        same = (random[distance:] == random[:-distance]).float().mean()
        assert abs(same - 0.1) < 5 * (0.09 / 20_000) ** 0.5
    counts = random.bincount()
    assert ((counts - 2000).abs() < 5 * (2000 * 0.9) ** 0.5).all() and counts.float().std() > 0


def test_mistakes(checkpoint, tmp_path, monkeypatch):
    for changes, message in (
        (dict(save="jpg"), "--save takes npz, latents, got 'jpg'"),
        (dict(batch_size=0), "batch_size must be positive"),
        (dict(sheet_scales="1,x"), "numbers separated by commas"),
        (dict(vae="some/vae"), "latents of this store are pixels"),
        (dict(num_steps=3000), "num_steps must lie between"),
        (dict(guidance_scale=float("nan")), "guidance_scale must be a finite number, got nan"),
        (dict(guidance_scale=float("inf")), "guidance_scale must be a finite number, got inf"),
        (dict(sheet_scales="1,nan"), "guidance_scale must be a finite number, got nan"),
        (dict(guidance_interval="100"), r"takes two timesteps, LOWEST,HIGHEST, got '100'"),
        (dict(guidance_interval="low,900"), r"takes two timesteps, LOWEST,HIGHEST, got 'low,900'"),
        (dict(guidance_interval=(900, 100)), r"interval \(900, 100\) has its lowest timestep above its highest"),
    ):
        with pytest.raises(InputError, match=message):
            draw(checkpoint, tmp_path / "x", **changes)
    assert not (tmp_path / "x").exists()
    with pytest.raises(InputError, match=r"precision fp16 is for GPUs: .*use bf16 or 32 here"):
        draw(checkpoint, tmp_path / "fp16", precision="fp16")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot write to .*file/x: Not a directory; choose another place with --out"):
        draw(checkpoint, tmp_path / "file" / "x")
    with pytest.raises(InputError, match=r"^accelerator cpu, devices none: "):
        draw(checkpoint, tmp_path / "x", devices="none")
    with (
        pytest.raises(InputError, match="out of memory with 64 at once: lower --batch_size"),
        enough_memory("--batch_size", 64),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("interval", ["100,900", "[100, 900]", "(100,900)", [100, 900], (100, 900)])
def test_an_interval_may_be_written_in_any_way(interval):
    assert Sampling(guidance_interval=interval).guidance_interval == (100, 900)


def test_an_image_that_is_not_finite_is_named_with_its_step(checkpoint, tmp_path):
    contents = checkpoints.read(checkpoint)
    for value, why in ((1e38, "its weights are finite.*lower the guidance"), (np.inf, "'label_embed.weight' are not")):
        contents.state["label_embed.weight"][2] = value
        write_safetensors(contents, tmp_path / "x.safetensors")
        said = r"^image 2 \(class 2\) is not finite from step 1 of 4 \(timestep 999\) on, one of 1 such among 4 .*"
        with pytest.raises(InputError, match=said + why):
            draw(tmp_path / "x.safetensors", tmp_path / str(value), num_samples=10, sampler="ddim")
        assert not images(tmp_path / str(value))


def test_a_step_on_the_way_that_is_not_finite_is_found():
    process, sampling = GaussianDiffusion(), Sampling("ddim", 10, guidance_scale=1.0)

    def model(x, t, y):
        return torch.where((y == 3)[:, None, None, None] & (t < 500)[:, None, None, None], np.nan, x)

    arguments = sampling, process, model, (1, 2, 2), torch.tensor([0, 3, 3]), 5, [4, 8, 9]
    x0 = draw_samples(*arguments)
    later = next(i for i, t in enumerate(process.timesteps(10).tolist()) if t < 500) + 1
    with pytest.raises(
        InputError, match=rf"^image 8 \(class 3\) is not finite from step {later} of 10 .* one of 2 such"
    ):
        check_finite(x0, *arguments)
    check_finite(x0[:1], sampling, process, model, (1, 2, 2), torch.tensor([0]), 5, [4])


def test_bare_weights_of_a_width_that_the_paper_lacks_are_drawn_with_their_number_of_heads(tmp_path):
    model, path = scrambled(in_channels=3, num_classes=5), tmp_path / "x.pt"
    torch.save(model.state_dict(), path)
    settings = dict(in_channels=3, input_size=8, num_samples=3)
    with pytest.raises(InputError, match=r"has width 48, .*give num_heads \(--num_heads\)"):
        draw(path, tmp_path / "out", **settings)
    draw(path, tmp_path / "bare", num_heads=4, **settings)
    write_safetensors(contents_of(model, latents=PIXELS), tmp_path / "x.safetensors")
    draw(tmp_path / "x.safetensors", tmp_path / "whole", num_samples=3)
    assert images(tmp_path / "bare") == images(tmp_path / "whole") and len(images(tmp_path / "bare")) == 3
    arguments = dict(num_heads=4, in_channels=3, input_size=8, num_samples=4, draws=1, bins=2, accelerator="cpu")
    write_store(tmp_path / "store", torch.rand(10, 3, 8, 8), torch.arange(10) % 5, 5)
    evaluate_loss(str(path), str(tmp_path / "store"), **arguments)


def test_a_picture_that_the_vae_overflows_on_is_named(checkpoint):
    loaded = checkpoints.load(checkpoint)
    pipeline = SamplingPipeline(
        loaded.denoiser, loaded.process, loaded.latents, Sampling("ddim", 2), 0, torch.device("cpu"),
        decode=lambda z: 1 / z, decode_batch_size=2,
    )  # fmt: skip
    latents = torch.ones(5, 3, 8, 8)
    assert pipeline.images(latents).shape == (5, 3, 8, 8)
    latents[3, 0, 0, 0] = 0
    for indices, number in ((None, 3), ([20, 21, 22, 33, 34], 33)):
        with pytest.raises(
            InputError, match=f"^image {number} is not finite once it is decoded, one of 1 such among 2"
        ):
            pipeline.images(latents, indices)


def test_a_full_disk_is_one_line_and_costs_nothing(checkpoint, tmp_path):
    """A limit on the size of files stands for the full disk: images fit, the npz file does not."""
    words = ["--ckpt", checkpoint, "--out", tmp_path / "x", "--num_samples", "40", "--num_steps", "2", "--save", "npz"]
    command = [sys.executable, "-m", "ditlit", "sample", *words, "--accelerator", "cpu"]
    limited = "import resource, signal, sys, runpy\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    limited += "resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))\nrunpy.run_module('ditlit', None, '__main__')"
    full = subprocess.run([sys.executable, "-c", limited, *command[3:]], capture_output=True, text=True)
    assert full.returncode == 2 and "Traceback" not in full.stderr
    assert (
        "ditlit: error: File too large" in full.stderr
        and "Free some space and run the command again to go on" in full.stderr
    )
    before = images(tmp_path / "x")
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0 and "images/s\n" not in again.stdout, again.stderr  # nothing is drawn anew
    assert len(before) == 40 and images(tmp_path / "x") == before
    assert np.load(tmp_path / "x" / "samples.npz")["arr_0"].shape == (40, 8, 8, 3)


def test_ctrl_c_is_one_line_and_costs_nothing(checkpoint, tmp_path):
    words = ["--ckpt", checkpoint, "--out", tmp_path / "x", "--num_samples", "20", "--batch_size", "2"]
    command = [sys.executable, "-m", "ditlit", "sample", *words, "--accelerator", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list((tmp_path / "x").glob("images/*.png")):
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "Traceback" not in said, said
    assert "ditlit: stopped by Ctrl-C; run the command again to go on: what is written is kept" in said
    assert 1 <= len(images(tmp_path / "x")) < 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layers_for_cpus_compute_the_same(dtype):
    torch.manual_seed(0)
    model = DiT(input_size=8, in_channels=3, num_classes=5, patch_size=2, hidden_size=64, depth=2, num_heads=2).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    arguments = torch.randn(2, 3, 8, 8), torch.tensor([3, 900]), torch.tensor([0, 5])
    with torch.inference_mode():
        exact = model(*arguments)
        plain = model.to(dtype)(*arguments).float()
        fuse(model)
        fused = model(*arguments).float()
    error = (fused - exact).pow(2).mean().sqrt() / exact.std()
    if dtype == torch.float32:
        assert error < 1e-6
    else:  # no less exact than PyTorch's own layers
        assert error < 1.1 * (plain - exact).pow(2).mean().sqrt() / exact.std() < 0.02
    assert any(isinstance(module, FusedMLP) for module in model.modules()) == supported(dtype)
