"""Checkpoints: weights come in from every format, nothing in a file is run, and what does not fit is named."""

import argparse
import json
import pickle
import shutil
import socket
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from weights import assert_same, parameters, released, scrambled

from ditlit import checkpoints, hub
from ditlit.checkpoints import from_released
from ditlit.diffusion import GaussianDiffusion
from ditlit.errors import InputError
from ditlit.images.vae import load_vae
from ditlit.models import DiT
from ditlit.models.embeddings import sincos_positions
from ditlit.training import DiTModule

REFERENCE = Path(__file__).parents[1] / "models" / "dit_reference.safetensors"


@pytest.fixture
def trained(make_module, make_trainer, datamodule, tmp_path):
    module = make_module(process=GaussianDiffusion(schedule="cosine"))
    trainer = make_trainer()
    trainer.fit(module, datamodule)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    return module, tmp_path / "x.ckpt"


@pytest.fixture(scope="module")
def reference():
    """The recorded weights under released names, their configuration, and numbers that they give."""
    with safe_open(REFERENCE, "pt") as file:
        weights = {k.removeprefix("weights."): file.get_tensor(k) for k in file.keys() if k.startswith("weights.")}  # noqa: SIM118
        numbers = {k: file.get_tensor(f"model.{k}") for k in ("x", "t", "y", "out")}
        return weights, json.loads(file.metadata()["config"]), numbers


def test_average_and_raw_weights_come_back(trained):
    module, path = trained
    ema, raw = checkpoints.load(path), checkpoints.load(path, "raw")
    assert_same(parameters(ema.denoiser), parameters(module.denoiser))  # the module holds the average by now
    module.ema._swap_out(module)
    assert_same(parameters(raw.denoiser), parameters(module.denoiser))
    assert ema.step == 4 and not ema.denoiser.training
    assert (ema.weights, raw.weights) == ("ema", "raw")
    assert ema.process.config == module.process.config and ema.process.config["schedule"] == "cosine"
    assert ema.latents["scale"] == pytest.approx([0.3, 0.4, 0.5]) and ema.latents["kind"] == "moments"


def test_lightning_loads_it_too(trained):
    module, path = trained
    loaded = DiTModule.load_from_checkpoint(path)
    assert_same(parameters(loaded.denoiser), parameters(module.denoiser))
    assert torch.equal(loaded.latent_scale, module.latent_scale)
    assert loaded.process.config == module.process.config
    y = torch.tensor([0, 1])
    loaded.sampling = module.sampling
    with torch.no_grad():
        assert torch.equal(loaded.eval().sample(y, [0, 1]), module.eval().sample(y, [0, 1]))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_recorded_weights_of_the_released_code_give_the_recorded_output(reference, tmp_path, suffix):
    weights, config, numbers = reference
    path = tmp_path / f"dit{suffix}"
    save_file(weights, path) if suffix == ".safetensors" else torch.save(weights, path)
    with pytest.raises(InputError, match=r"has width 48, which is none of the paper's .*; give num_heads"):
        checkpoints.load(path)
    loaded = checkpoints.load(path, num_heads=config["num_heads"])
    assert {key: loaded.denoiser.config[key] for key in config} == config
    with torch.no_grad():
        out = loaded.denoiser(numbers["x"], numbers["t"], numbers["y"])
    torch.testing.assert_close(out, numbers["out"], rtol=1e-5, atol=1e-5 * numbers["out"].abs().max().item())


@pytest.mark.parametrize("variant", ["DiT-S/8", "DiT-S/2", "DiT-B/4", "DiT-L/2", "DiT-XL/2"])
@pytest.mark.parametrize("input_size", [32, 64])
def test_sizes_of_released_weights_are_told_from_their_shapes(variant, input_size):
    from ditlit.checkpoints.sizes import infer
    from ditlit.settings import Reading

    with torch.device("meta"):
        model = DiT(variant, input_size=input_size, num_classes=1000)
        state = checkpoints.names.rename(
            {k: v for k, v in released(model).items() if k != "pos_embed"}, checkpoints.names.RELEASED, "DiT"
        )
    tokens = model.grid[0] * model.grid[1]
    assert infer(state, tokens, Reading(), "x.pt") == model.config


def test_released_weights_bring_the_paper_s_process_and_latents(tmp_path):
    model = scrambled(hidden_size=384, num_heads=6, num_classes=1000, input_size=32, patch_size=8, depth=1)
    torch.save(released(model), tmp_path / "DiT.pt")
    loaded = checkpoints.load(tmp_path / "DiT.pt")
    assert_same(parameters(loaded.denoiser), parameters(model))
    assert loaded.process.config == GaussianDiffusion().config
    assert (loaded.step, loaded.weights) == (0, "unknown")
    assert loaded.latents["shift"] == [0.0] * 4 and loaded.latents["scale"] == pytest.approx([0.18215] * 4)
    assert loaded.latents["vae"] == {"class": "AutoencoderKL", "source": "stabilityai/sd-vae-ft-ema"}
    assert loaded.latents["image_size"] == 256


def test_files_of_old_torch_are_read_too(tmp_path):
    model = scrambled()
    torch.save({"ema": released(model)}, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    assert_same(parameters(checkpoints.load(tmp_path / "x.pt", num_heads=4).denoiser), parameters(model))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_what_wrappers_put_in_front_of_the_names_is_no_obstacle(tmp_path, prefix):
    model = scrambled()
    torch.save({prefix + key: value for key, value in released(model).items()}, tmp_path / "x.pt")
    assert_same(parameters(checkpoints.load(tmp_path / "x.pt", num_heads=4).denoiser), parameters(model))


def test_the_training_form_of_the_released_code_holds_both_sets_of_weights(tmp_path):
    raw, ema = scrambled(0), scrambled(1)
    args = argparse.Namespace(model="DiT-XL/2", vae="mse", num_classes=1000, epochs=1400)
    content = {
        "model": {f"module.{k}": v for k, v in released(raw).items()},
        "ema": released(ema),
        "opt": {"state": {}, "param_groups": [{"lr": 1e-4}]},
        "args": args,
    }
    torch.save(content, tmp_path / "0400000.pt")
    for which, model in (("raw", raw), ("ema", ema)):
        loaded = checkpoints.load(tmp_path / "0400000.pt", which, num_heads=4)
        assert_same(parameters(loaded.denoiser), parameters(model))
        assert loaded.weights == which and loaded.latents["vae"]["source"] == "stabilityai/sd-vae-ft-mse"
    torch.save({"model": content["model"]}, tmp_path / "model.pt")
    with pytest.raises(InputError, match=r"model.pt has no 'ema' weights; it holds 'model'"):
        checkpoints.load(tmp_path / "model.pt", num_heads=4)


def test_a_position_table_that_is_not_the_fixed_one_was_learned(tmp_path):
    model = scrambled(positions="learned")
    torch.save(released(model), tmp_path / "x.pt")
    loaded = checkpoints.load(tmp_path / "x.pt", num_heads=4)
    assert loaded.denoiser.config["positions"] == "learned"
    assert_same(parameters(loaded.denoiser), parameters(model))


def test_half_precision_weights_keep_their_fixed_positions(tmp_path):
    model = scrambled()
    torch.save({k: v.half() for k, v in released(model).items()}, tmp_path / "x.pt")
    loaded = checkpoints.load(tmp_path / "x.pt", num_heads=4)
    assert loaded.denoiser.config["positions"] == "sincos"
    assert_same(parameters(loaded.denoiser), {k: v.half().float() for k, v in parameters(model).items()})


def test_bare_weights_under_our_names_ask_for_what_shapes_do_not_tell(tmp_path):
    model = scrambled(in_channels=3, input_size=(4, 8))
    save_file(dict(model.state_dict()), tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="patches of 12 values; give in_channels"):
        checkpoints.load(tmp_path / "x.safetensors", num_heads=4)
    with pytest.raises(InputError, match="no position table to tell its input size; give input_size"):
        checkpoints.load(tmp_path / "x.safetensors", num_heads=4, in_channels=3)
    loaded = checkpoints.load(tmp_path / "x.safetensors", num_heads=4, in_channels=3, input_size=(4, 8))
    assert_same(parameters(loaded.denoiser), parameters(model))
    assert loaded.latents["vae"] is None


def test_missing_truncated_and_foreign_files_are_refused(trained, tmp_path):
    _, path = trained
    with pytest.raises(InputError, match="there is no checkpoint at"):
        checkpoints.load(tmp_path / "nothing.ckpt")
    for suffix in (".ckpt", ".pt", ".safetensors"):
        (tmp_path / f"cut{suffix}").write_bytes(path.read_bytes()[:5000])
        with pytest.raises(InputError, match="truncated or foreign"):
            checkpoints.load(tmp_path / f"cut{suffix}")
    save_file(dict(scrambled().state_dict()), tmp_path / "whole.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:-100])
    with pytest.raises(InputError, match="truncated or foreign"):
        checkpoints.load(tmp_path / "cut.safetensors")
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(InputError, match="not a ditlit training checkpoint: it lacks global_step, hyper_parameters"):
        checkpoints.load(tmp_path / "other.ckpt")
    for content, message in (
        ([1, 2], "it holds a list"),
        ({}, "holds no weights of a DiT"),
        ({"epoch": 3}, "'epoch' is no tensor"),
        ({"conv.weight": torch.zeros(2)}, "'conv.weight' is not a key of the released DiT weights"),
    ):
        torch.save(content, tmp_path / "other.pt")
        with pytest.raises(InputError, match=message):
            checkpoints.load(tmp_path / "other.pt")
    with pytest.raises(InputError, match=r"no .*config.json; is this a diffusers folder"):
        checkpoints.load(tmp_path)


def test_weights_that_do_not_fit_are_named_with_both_shapes(trained, tmp_path):
    _, path = trained
    content = torch.load(path)
    for state in (content["state_dict"], content["current_model_state"]):
        state["denoiser.blocks.1.mlp.fc_in.bias"] = torch.zeros(3)
    torch.save(content, path)
    with pytest.raises(InputError, match=r"'blocks.1.mlp.fc_in.bias' with shape \(3,\), this model needs \(64,\)"):
        checkpoints.load(path)
    state = released(scrambled())
    del state["blocks.1.attn.qkv.bias"]
    torch.save(state, tmp_path / "lacks.pt")
    with pytest.raises(InputError, match=r"has no 'blocks.1.attn.qkv.bias', which this model holds with shape \(144,"):
        checkpoints.load(tmp_path / "lacks.pt", num_heads=4)
    with pytest.raises(InputError, match=r"'pos_embed' with shape \(16, 48\), this model needs \(8, 48\)"):
        torch.save(released(scrambled()), tmp_path / "x.pt")
        checkpoints.load(tmp_path / "x.pt", num_heads=4, input_size=(4, 8))


@pytest.mark.parametrize("name", ["evil.ckpt", "evil.pt"])
@pytest.mark.parametrize("place", ["state_dict", "args", "whole"])
def test_no_code_in_a_checkpoint_is_run(tmp_path, name, place):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    content = {
        "state_dict": {"state_dict": Evil()},
        "args": {"ema": released(scrambled()), "args": argparse.Namespace(vae=Evil())},
        "whole": Evil(),
    }
    torch.save(content[place], tmp_path / name)
    with pytest.raises(InputError):
        checkpoints.load(tmp_path / name, num_heads=4)
    assert not (tmp_path / "owned").exists()
    with pytest.raises(InputError, match=r"names os.system, which is no class of ditlit"):
        checkpoints.build({"class_path": "os.system", "init_args": {"command": "true"}})


def test_a_namespace_in_a_checkpoint_leaves_no_door_open_behind_it(tmp_path):
    torch.save({"args": argparse.Namespace(a=1)}, tmp_path / "x.pt")
    with pytest.raises(InputError):
        checkpoints.load(tmp_path / "x.pt")
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


@pytest.mark.parametrize("online", [True, False])
def test_a_hub_that_cannot_be_reached_is_said_in_one_line(monkeypatch, online):
    def unreachable(name, allow_patterns, local_files_only):
        assert name == "facebook/DiT-XL-2-256" and all(p.endswith((".json", ".safetensors")) for p in allow_patterns)
        assert local_files_only == (not online)
        raise ConnectionError("no route")

    monkeypatch.setattr("ditlit.hub.reachable", lambda: online)
    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(
        InputError, match=r"nothing at facebook/DiT-XL-2-256.*\(ConnectionError\); give the path"
    ) as said:
        checkpoints.load("facebook/DiT-XL-2-256")
    assert ("cannot be reached" in str(said.value)) == (not online)


def test_a_hub_that_does_not_answer_is_tried_once(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes connections and never answers
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(hub, "PATIENCE", 0.2)
        start = time.monotonic()
        for load, said in ((checkpoints.load, "cannot be reached, nor has its cache"), (load_vae, "cannot be reached")):
            with pytest.raises(InputError, match=said):
                load("owner/name")
        assert time.monotonic() - start < 20
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not hub.reachable()


MODULE = torch.nn.Linear(2, 2)  # pickled below, whole
FOREIGN = {
    "empty.pt": (lambda path: path.touch(), "it is empty"),
    "pointer.pt": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"),
                   "it is a Git LFS pointer.*run git lfs pull"),
    "page.ckpt": (lambda path: path.write_text("\n<!DOCTYPE html><html>404</html>"), "it is a web page"),
    "module.pt": (lambda path: torch.save(MODULE, path), r"an object of torch.nn.modules.linear.Linear as a"),
    "inside.ckpt": (lambda path: torch.save({"model": MODULE}, path), r"Python pickle.*weights_only=False"),
    "legacy.pt": (lambda path: torch.save(MODULE, path, _use_new_zipfile_serialization=False), "Python pickle"),
    "plain.pt": (lambda path: path.write_bytes(pickle.dumps({"a": [1, 2]})), "it holds objects as a Python pickle"),
    "noise.pt": (lambda path: path.write_bytes(b"noise" * 99), "it may be truncated or foreign"),
}  # fmt: skip
FOREIGN |= {name.replace(".pt", ".safetensors"): FOREIGN[name] for name in ("empty.pt", "pointer.pt", "noise.pt")}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_that_is_no_checkpoint_is_told_for_what_it_is(tmp_path, name):
    write, said = FOREIGN[name]
    write(tmp_path / name)
    with pytest.raises(InputError, match=rf"{name} cannot be read as (a checkpoint|safetensors).*{said}") as error:
        checkpoints.load(tmp_path / name)
    assert "\n" not in str(error.value)


def test_a_run_s_folder_stands_for_its_last_checkpoint(trained, tmp_path, capsys):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    shutil.copy(trained[1], run / "checkpoints" / "step=4.ckpt")
    with pytest.raises(InputError, match=r"the run .*run has no checkpoints/last.ckpt; name one .*: step=4.ckpt"):
        checkpoints.load(run)
    shutil.copy(trained[1], run / "checkpoints" / "last.ckpt")
    for folder in (run, run / "checkpoints"):
        for _ in range(2):
            assert_same(
                parameters(checkpoints.load(folder).denoiser), parameters(checkpoints.load(trained[1]).denoiser)
            )
        said = capsys.readouterr().out
        assert said == f"{folder} is the folder of a run: taking {run / 'checkpoints' / 'last.ckpt'}\n"


def test_released_names_map_one_to_one():
    model = scrambled()
    state = released(model)
    assert_same(from_released(state), dict(model.state_dict()))
    assert torch.equal(state["pos_embed"][0], sincos_positions(48, (4, 4)))
    assert state["x_embedder.proj.weight"].shape == (48, 4, 2, 2)
    with pytest.raises(InputError, match=r"'head.weight' is not a key of the released DiT weights"):
        from_released(state | {"head.weight": torch.zeros(1)})
