"""Denoisers, processes and terms of the loss that are the user's own: from training to samples, if they are trusted."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from calls import convert, evaluate_loss, sample
from own import Forgetful, OwnDenoiser, OwnProcess
from torch import nn
from weights import assert_same, parameters, scrambled

from ditlit import checkpoints
from ditlit.checkpoints.torch_files import write_released
from ditlit.data import LatentDataModule, write_store
from ditlit.errors import InputError


@pytest.fixture
def pixels(tmp_path):
    images = torch.rand(20, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    write_store(tmp_path / "store", images, torch.arange(20) % 5, 5)
    return str(tmp_path / "store")


@pytest.fixture
def trained(make_module, make_trainer, pixels, tmp_path):
    """A run of the user's own classes, with a validation on the way."""
    module = make_module(denoiser=OwnDenoiser(), process=OwnProcess(weight=0.25))
    trainer = make_trainer(max_steps=2, val_check_interval=1)
    trainer.fit(module, LatentDataModule(pixels, val_size=8, global_batch_size=4, val_batch_size=4))
    trainer.save_checkpoint(tmp_path / "own.ckpt")
    return module, trainer, str(tmp_path / "own.ckpt")


def test_each_term_of_an_own_loss_is_validated(trained, make_module, make_trainer, pixels):
    _, trainer, path = trained
    found = dict(trainer.callback_metrics)
    assert {"val/loss", "val/mse", "val/size.of"} <= set(found) and "val/vlb" not in found
    assert float(found["val/loss"]) == pytest.approx(float(found["val/mse"] + 0.25 * found["val/size.of"]), rel=1e-5)
    data = LatentDataModule(pixels, val_size=8, global_batch_size=4, val_batch_size=4)
    again = make_module(denoiser=OwnDenoiser(), process=OwnProcess(weight=0.25))
    results = make_trainer().validate(again, data, ckpt_path=path, verbose=False)[0]
    assert results == pytest.approx({name: float(found[name]) for name in ("val/loss", "val/mse", "val/size.of")})
    resumed = make_trainer(max_steps=3, val_check_interval=1)
    resumed.fit(again, data, ckpt_path=path)
    assert resumed.global_step == 3 and "val/size.of" in resumed.callback_metrics


def test_an_own_class_is_built_only_where_it_is_trusted(trained, tmp_path):
    module, _, path = trained
    for trust in (None, "other", ("ow",), "own.OwnProcess", "own.Own"):
        with pytest.raises(InputError, match=r"names own.OwnDenoiser, which is no class of ditlit.*--trust own \("):
            checkpoints.load(path, trust=trust)
    with pytest.raises(InputError, match=r"names own.OwnProcess, which is no class of ditlit"):
        checkpoints.load(path, trust="own.OwnDenoiser")
    for trust in ("own", ("other", "own"), "other, own", ["own.OwnDenoiser", "own.OwnProcess"]):
        loaded = checkpoints.load(path, trust=trust)
        assert_same(parameters(loaded.denoiser), parameters(module.denoiser))
        assert type(loaded.process) is OwnProcess and loaded.process.weight == 0.25


def test_no_module_is_imported_but_those_that_are_trusted(trained, tmp_path, monkeypatch):
    content = torch.load(trained[2])
    (tmp_path / "harmful.py").write_text(f"open({str(tmp_path / 'harmed')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    content["hyper_parameters"]["process"]["class_path"] = "harmful.Process"
    torch.save(content, trained[2])
    with pytest.raises(InputError, match=r"names harmful.Process, which is no class of ditlit"):
        checkpoints.load(trained[2], trust="own")
    assert not (tmp_path / "harmed").exists()
    for path, message in (("own.Nothing", "has no attribute 'Nothing'"), ("own.inner.Thing", "No module named")):
        content["hyper_parameters"]["process"]["class_path"] = path
        torch.save(content, trained[2])
        with pytest.raises(InputError, match=rf"names {path}, which cannot be imported \(.*{message}.*PYTHONPATH"):
            checkpoints.load(trained[2], trust="own")
    content["hyper_parameters"]["process"] = {"class_path": "own.OwnProcess", "init_args": {"heavy": 1}}
    torch.save(content, trained[2])
    with pytest.raises(InputError, match=r"own.OwnProcess does not take the keywords.*unexpected keyword argument 'he"):
        checkpoints.load(trained[2], trust="own")


def test_commands_take_own_classes(trained, pixels, tmp_path, capsys):
    path = trained[2]
    drawing = dict(num_steps=2, num_samples=3, accelerator="cpu")
    with pytest.raises(InputError, match="--trust own"):
        sample(path, str(tmp_path / "out"), **drawing)
    for precision in ("32", "bf16"):
        sample(path, str(tmp_path / precision), precision=precision, trust="own", **drawing)
        assert len(list((tmp_path / precision / "images").glob("*.png"))) == 3
    with pytest.raises(InputError, match="between classes needs a denoiser with an embedding of labels, label_embed"):
        sample(path, str(tmp_path / "out"), sheet="classes", trust="own", **drawing)
    convert(path, str(tmp_path / "own.safetensors"), trust="own")
    assert "own.OwnDenoiser" in capsys.readouterr().out
    both = [checkpoints.load(p, trust="own").denoiser for p in (path, tmp_path / "own.safetensors")]
    assert_same(*map(parameters, both))
    with pytest.raises(InputError, match=r"^the released format holds a DiT only, not a own.OwnDenoiser$"):
        convert(path, str(tmp_path / "own.pt"), trust="own")
    evaluate_loss(path, pixels, num_samples=4, draws=1, bins=2, accelerator="cpu", trust="own")


def test_the_command_line_trusts_by_name(trained, tmp_path):
    words = ["--ckpt", trained[2], "--out", str(tmp_path / "out"), "--num_steps", "2", "--num_samples", "2"]
    command = [sys.executable, "-m", "ditlit", "sample", *words, "--accelerator", "cpu", "--trust", "own"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert result.returncode == 0 and len(list((tmp_path / "out" / "images").glob("*.png"))) == 2, result.stderr


def test_a_process_of_ones_own_has_no_place_in_other_formats(trained, tmp_path):
    contents = checkpoints.read(trained[2], trust="own")
    model = scrambled()
    contents.state, contents.denoiser = dict(model.state_dict()), checkpoints.describe(model)
    with pytest.raises(InputError, match=r"holds a GaussianDiffusion only, not a own.OwnProcess"):
        write_released(contents, tmp_path / "x.pt")


def test_classes_that_a_checkpoint_could_not_describe_are_refused_before_training(make_module):
    with pytest.raises(
        InputError, match=r"denoiser Linear needs an attribute in_channels, input_size, num_classes, conf"
    ):
        make_module(denoiser=nn.Linear(2, 2))
    with pytest.raises(InputError, match=r"^Forgetful takes power, which its config does not hold"):
        make_module(process=Forgetful(power=3.0))
    denoiser = OwnDenoiser()
    denoiser.config = None
    with pytest.raises(InputError, match=r"^OwnDenoiser needs an attribute config, the dict of keywords"):
        make_module(denoiser=denoiser)
