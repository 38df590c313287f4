"""Conversions: weights survive every way through the formats bit for bit, and diffusers runs what it is given."""

import itertools

import pytest
import torch
from calls import convert
from weights import LATENTS, assert_same, parameters, released, scrambled

from ditlit import checkpoints
from ditlit.__main__ import main
from ditlit.diffusion import GaussianDiffusion, Sampling
from ditlit.errors import InputError
from ditlit.models import DiT
from ditlit.training import DiTModule

FORMATS = {"ckpt": "x.ckpt", "released": "x.pt", "safetensors": "x.safetensors", "diffusers": "folder"}


# Round trips ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first, second", list(itertools.permutations(FORMATS, 2)))
def test_weights_survive_any_two_formats_bit_for_bit(source, tmp_path, first, second):
    model = scrambled()
    convert(source(model), str(tmp_path / FORMATS[first]), num_heads=4)
    convert(str(tmp_path / FORMATS[first]), str(tmp_path / FORMATS[second]), num_heads=4)
    loaded = checkpoints.load(tmp_path / FORMATS[second], num_heads=4)
    assert_same(parameters(loaded.denoiser), parameters(model))
    assert loaded.denoiser.config == model.config | {"variant": "DiT-XL/2"}
    if "released" not in (first, second):
        assert loaded.latents == LATENTS and (loaded.step, loaded.weights) == (400_000, "ema")


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("variant, depth", [("DiT-S/8", None), ("DiT-B/4", 2)])
def test_the_paper_s_sizes_survive_without_being_told_anything(tmp_path, to, variant, depth):
    model = DiT(variant, num_classes=1000, depth=depth)
    torch.save(released(model), tmp_path / "DiT.pt")
    convert(str(tmp_path / "DiT.pt"), str(tmp_path / FORMATS[to]))
    convert(str(tmp_path / FORMATS[to]), str(tmp_path / "back.pt"), overwrite=True)
    assert_same(torch.load(tmp_path / "back.pt"), torch.load(tmp_path / "DiT.pt"))
    loaded = checkpoints.load(tmp_path / FORMATS[to])
    assert {k: v for k, v in loaded.denoiser.config.items() if k != "variant"} == {
        k: v for k, v in model.config.items() if k != "variant"
    }


@pytest.mark.parametrize("to", ["ckpt", "safetensors"])
def test_our_formats_hold_every_configuration(source, tmp_path, to):
    model = scrambled(positions="learned", input_size=(4, 8), mlp_ratio=2.0, learn_sigma=False, in_channels=3)
    process = GaussianDiffusion(schedule="cosine", clip_x0=True, num_timesteps=100)
    path = source(model, process, {"shift": [0.0] * 3, "scale": [1.0] * 3, "vae": None})
    convert(path, str(tmp_path / FORMATS[to]))
    loaded = checkpoints.load(tmp_path / FORMATS[to])
    assert_same(parameters(loaded.denoiser), parameters(model))
    assert loaded.denoiser.config == model.config and loaded.process.config == process.config


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_precision_is_kept_unless_another_is_asked_for(source, tmp_path, to, dtype):
    model = scrambled()
    convert(source(model), str(tmp_path / "half.safetensors"), dtype=dtype)
    convert(str(tmp_path / "half.safetensors"), str(tmp_path / FORMATS[to]))
    state = checkpoints.read(tmp_path / FORMATS[to], num_heads=4).state
    assert_same(state, {k: v.to(getattr(torch, dtype)) for k, v in model.state_dict().items()})


def test_raw_and_averaged_weights_of_a_run_are_told_apart(make_module, make_trainer, datamodule, tmp_path):
    module, trainer = make_module(), make_trainer()
    trainer.fit(module, datamodule)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    for which in ("ema", "raw"):
        convert(str(tmp_path / "run.ckpt"), str(tmp_path / f"{which}.ckpt"), weights=which)
        run, alone = checkpoints.load(tmp_path / "run.ckpt", which), checkpoints.load(tmp_path / f"{which}.ckpt")
        assert_same(parameters(alone.denoiser), parameters(run.denoiser))
        assert alone.weights == which and alone.step == run.step == 4 and alone.latents == run.latents
    with pytest.raises(InputError, match=r"ema.ckpt holds the moving average only; use weights='ema'"):
        checkpoints.load(tmp_path / "ema.ckpt", "raw")
    # Lightning and its commands take a converted checkpoint like any other.
    assert_same(parameters(DiTModule.load_from_checkpoint(tmp_path / "ema.ckpt").denoiser), parameters(module.denoiser))
    results = [
        make_trainer(limit_val_batches=2).validate(make_module(), datamodule, ckpt_path=path, verbose=False)
        for path in (tmp_path / "run.ckpt", tmp_path / "ema.ckpt")
    ]
    assert results[0] == results[1]


def test_released_weights_draw_samples_through_lightning(tmp_path):
    torch.save(released(scrambled()), tmp_path / "x.pt")
    convert(str(tmp_path / "x.pt"), str(tmp_path / "x.ckpt"), num_heads=4)
    module = DiTModule.load_from_checkpoint(tmp_path / "x.ckpt")
    module.sampling = Sampling(num_steps=2)
    with torch.no_grad():
        samples = module.eval().sample(torch.tensor([0, 6]), [0, 1])
    assert samples.shape == (2, 4, 8, 8)
    assert module.latent_scale.flatten().tolist() == LATENTS["scale"]


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config, to, message",
    [
        (dict(positions="learned"), "diffusers", "computes fixed positions and cannot hold a learned table"),
        (dict(input_size=(4, 8)), "diffusers", "square latents only, not 4x8"),
        (dict(input_size=(4, 8)), "released", "square latents only, not 4x8; write safetensors or a ckpt"),
        (dict(mlp_ratio=2.0), "diffusers", "MLPs 4 times as wide as its tokens, not 2.0 times"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_and_nothing_is_left(source, tmp_path, config, to, message):
    path = source(scrambled(**config))
    with pytest.raises(InputError, match=message):
        convert(path, str(tmp_path / "out" / FORMATS[to]))
    assert list((tmp_path / "out").iterdir()) == []


def test_nothing_is_overwritten_unasked_and_a_failure_leaves_what_was_there(source, tmp_path, monkeypatch):
    path, other = source(scrambled(0), name="0.safetensors"), source(scrambled(1), name="1.safetensors")
    for name in FORMATS.values():
        out = tmp_path / "out" / name
        convert(path, str(out))
        with pytest.raises(InputError, match=r"exists already; choose another place or set overwrite to true"):
            convert(other, str(out))
        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", lambda file: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                convert(other, str(out), overwrite=True)
        before = parameters(checkpoints.load(out, num_heads=4).denoiser)
        assert_same(before, parameters(scrambled(0)))
        convert(other, str(out), overwrite=True)
        assert_same(parameters(checkpoints.load(out, num_heads=4).denoiser), parameters(scrambled(1)))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(FORMATS.values())


# The command ---------------------------------------------------------------------------------------------------------


def test_it_says_what_it_read_and_wrote(source, tmp_path, capsys):
    convert(source(scrambled()), str(tmp_path / "x.ckpt"), dtype="bfloat16")
    lines = capsys.readouterr().out.splitlines()
    parameters = sum(p.numel() for p in scrambled().parameters()) + 16 * 48
    assert lines[0].endswith(
        "source.safetensors: ditlit safetensors, ema weights, depth 2, hidden_size 48, num_heads 4, patch_size 2, "
        f"{parameters:,} parameters, 7 classes, input 4x8x8, step 400000"
    )
    assert lines[1].endswith("x.ckpt: ckpt, bfloat16")
    assert "no optimizer is in it: train on with fit --model.init_from" in lines[2]


def test_files_are_no_larger_than_their_weights_and_everybody_s_to_read(source, tmp_path):
    model = scrambled(hidden_size=384, num_heads=6, num_classes=1000, depth=1)
    size = 4 * sum(p.numel() for p in model.parameters())
    path = source(model, latents=LATENTS | {"class_names": None})
    (plain := tmp_path / "plain").touch()
    for name in FORMATS.values():
        convert(path, str(tmp_path / name))
        file = tmp_path / name
        if file.is_dir():
            file /= "diffusion_pytorch_model.safetensors"
        assert size <= file.stat().st_size < size + 100_000
        assert file.stat().st_mode & 0o777 == plain.stat().st_mode & 0o777  # as readable as any new file


def test_the_command_line_takes_it(source, tmp_path, monkeypatch, capsys):
    words = ["--source", source(scrambled()), "--out", str(tmp_path / "x.pt"), "--dtype", "bfloat16"]
    monkeypatch.setattr("sys.argv", ["ditlit", "convert", *words])
    main()
    assert checkpoints.read(tmp_path / "x.pt", num_heads=4).state["final.linear.bias"].dtype == torch.bfloat16
    monkeypatch.setattr("sys.argv", ["ditlit", "convert", "--help", "dtype"])
    with pytest.raises(SystemExit):
        main()
    assert "precision of the weights written" in capsys.readouterr().out
