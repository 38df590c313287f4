"""Files, commands and checkpoints with names from before mean what they meant, and the new name is said once."""

import copy
import sys

import pytest
import torch
import yaml

from ditlit import checkpoints
from ditlit.cli import DitlitCLI
from ditlit.errors import InputError
from ditlit.settings import renamed
from ditlit.settings.configs import with_found_configs
from ditlit.training import DiTModule

OLD = {
    "trainer": {
        "max_steps": 1,
        "callbacks": [
            {"class_path": "ditlit.training.SampleGrid", "init_args": {"per_class": 2}},
            "ditlit.training.TrainingMonitor",
            {"class_path": "mine.SampleGrid", "init_args": {"label_dropout": 1}},
        ],
        "strategy": {"class_path": "ditlit.training.FSDP2"},
    },
    "model": {
        "label_dropout": 0.3,
        "denoiser": {"class_path": "ditlit.models.DiT", "init_args": {"use_checkpoint": True, "depth": 1}},
        "ema": {"class_path": "ditlit.training.EMA"},
    },
}
NEW = {
    "trainer": {
        "max_steps": 1,
        "callbacks": [
            {"class_path": "ditlit.callbacks.SampleGrid", "init_args": {"per_class": 2}},
            "ditlit.callbacks.TrainingMonitor",
            {"class_path": "mine.SampleGrid", "init_args": {"label_dropout": 1}},
        ],
        "strategy": {"class_path": "ditlit.parallel.FSDP2"},
    },
    "model": {
        "class_dropout_prob": 0.3,
        "denoiser": {"class_path": "ditlit.models.DiT", "init_args": {"gradient_checkpointing": True, "depth": 1}},
        "ema": {"class_path": "ditlit.training.EMA"},
    },
}


@pytest.fixture(autouse=True)
def nothing_said_yet():
    renamed.announce.cache_clear()


def test_settings_get_their_new_names_once_and_those_of_others_stay():
    before = copy.deepcopy(OLD)
    assert renamed.in_settings(OLD) == NEW and before == OLD
    assert renamed.in_settings(NEW) == NEW
    own = {"class_path": "mine.Net", "init_args": {"use_checkpoint": True}}
    assert renamed.in_settings({"model": {"denoiser": own}}) == {"model": {"denoiser": own}}
    flat = {"model": {"denoiser": {"use_checkpoint": True}}}
    assert renamed.in_settings(flat) == {"model": {"denoiser": {"gradient_checkpointing": True}}}


def test_every_class_that_is_named_anew_exists():
    for path in renamed.CLASSES.values():
        module, _, name = path.rpartition(".")
        assert hasattr(__import__(module, fromlist=[name]), name), path


def test_words_are_changed_only_where_a_name_is_from_before(tmp_path, capsys):
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(OLD))
    (tmp_path / "new.yaml").write_text(yaml.safe_dump(NEW))
    words = ["fit", "-c", str(tmp_path / "new.yaml"), f"--config={tmp_path / 'new.yaml'}", "--model.seed=a=b", "--x"]
    assert with_found_configs(words) == words and not capsys.readouterr().err
    words = [
        "fit", "--config", str(tmp_path / "old.yaml"), "--model.label_dropout=0.2", "--model.denoiser.use_checkpoint",
        "true", "--model.denoiser.init_args.use_checkpoint", "true", "--trainer.callbacks+=ditlit.training.SampleGrid",
        "--trainer.strategy", "ditlit.training.FSDP2",
    ]  # fmt: skip
    new = with_found_configs(words)
    assert yaml.safe_load(new[2]) == NEW
    assert new[3:] == [
        "--model.class_dropout_prob=0.2", "--model.denoiser.gradient_checkpointing", "true",
        "--model.denoiser.init_args.gradient_checkpointing", "true",
        "--trainer.callbacks+=ditlit.callbacks.SampleGrid", "--trainer.strategy", "ditlit.parallel.FSDP2",
    ]  # fmt: skip
    said = capsys.readouterr().err.splitlines()
    assert "ditlit: model.label_dropout is called model.class_dropout_prob now" in said
    assert len(said) == len(set(said)) == 6


def test_a_configuration_from_before_trains(tmp_path, monkeypatch):
    monkeypatch.setattr(DitlitCLI, "_run_subcommand", lambda self, subcommand: None)
    old = copy.deepcopy(OLD)
    del old["trainer"]["strategy"], old["trainer"]["callbacks"][2]
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(old))
    monkeypatch.setattr(sys, "argv", ["ditlit"])
    words = ["fit", "--config", "digits.yaml", "--config", str(tmp_path / "old.yaml")]
    with torch.device("meta"):
        built = DitlitCLI([*words, "--model.label_dropout", "0.2"])
    assert built.model.class_dropout_prob == 0.2 and built.model.denoiser.config["gradient_checkpointing"]
    old["model"]["denoiser"]["init_args"]["dept"] = 2
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(old))
    with pytest.raises(InputError, match=r"no setting model.denoiser.init_args.dept in the configuration; .*depth"):
        DitlitCLI(words)


def test_checkpoints_from_before_are_read(make_module, make_trainer, datamodule, tmp_path):
    trainer = make_trainer(max_steps=1)
    module = make_module()
    trainer.fit(module, datamodule)
    trainer.save_checkpoint(tmp_path / "new.ckpt")
    content = torch.load(tmp_path / "new.ckpt")
    settings = content["hyper_parameters"]
    settings["label_dropout"] = settings.pop("class_dropout_prob")
    arguments = settings["denoiser"]["init_args"]
    arguments["use_checkpoint"] = arguments.pop("gradient_checkpointing")
    torch.save(content, tmp_path / "old.ckpt")
    for read in (checkpoints.load, lambda path: DiTModule.load_from_checkpoint(path, map_location="cpu")):
        old, new = (read(tmp_path / f"{name}.ckpt").denoiser for name in ("old", "new"))
        assert old.config == new.config
        assert all(map(torch.equal, old.state_dict().values(), new.state_dict().values()))
    continued = make_trainer(max_steps=2)
    continued.fit(make_module(), datamodule, ckpt_path=tmp_path / "old.ckpt", weights_only=False)
    assert continued.global_step == 2
