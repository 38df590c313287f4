"""A run lives in trainer.default_root_dir whatever its loggers and is not written over; --ckpt_path is understood."""

import json
import sys

import pytest
import yaml
from calls import convert
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from ranks import write_config
from weights import scrambled

from ditlit.cli import DitlitCLI
from ditlit.errors import InputError
from ditlit.resilience import CheckpointFiles
from ditlit.resilience.checkpoint_files import step_of, write
from ditlit.resilience.run_folder import find_checkpoint, trace_of_a_run
from ditlit.resilience.saving import KeptCheckpoints, LastCheckpoint

CSV = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "elsewhere"}}
TENSORBOARD = {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": {"save_dir": "elsewhere"}}


@pytest.fixture
def small(monkeypatch, tmp_path, store):
    """Runs a command on the small training of :mod:`ranks`, in this process; ``run`` is its folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ditlit"])
    config = write_config(tmp_path / "run", store, "auto")
    content = yaml.safe_load(config.read_text())
    content["trainer"]["callbacks"] = [content["trainer"]["callbacks"][2]]  # draws samples
    content["trainer"] |= dict(max_steps=2, val_check_interval=2, logger=[CSV, TENSORBOARD])
    config.write_text(yaml.safe_dump(content))

    def command(name, *words):
        return DitlitCLI([name, "--config", str(config), *words])

    return command


@pytest.mark.parametrize("logger", ["false", CSV], ids=["none", "csv"])
def test_where_checkpoints_are_does_not_depend_on_loggers(command, tmp_path, logger):
    logger = ["--trainer.logger", logger if isinstance(logger, str) else json.dumps(logger)]
    last = tmp_path / "checkpoints" / "last.ckpt"
    write({"global_step": 3}, last)
    with pytest.raises(InputError, match="holds a run already"):
        command("fit", *logger)
    assert command("validate", "--ckpt_path", "last", *logger)["ckpt_path"] == str(last)


def test_a_run_with_other_loggers_is_all_in_its_folder_and_goes_on_from_there(small, tmp_path, capsys):
    """And it is refused without a word on how, and a refused continuation leaves its configuration as it is."""
    run = tmp_path / "run"
    with pytest.raises(InputError, match="does not divide"):
        small("fit", "--trainer.accumulate_grad_batches", "3")
    small("fit")  # what was refused has left nothing behind that could stand in the way
    files = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    assert {"config.yaml", "checkpoints/last.ckpt", "samples/step-00000002.png"} <= files
    config = (run / "config.yaml").read_bytes()
    with pytest.raises(InputError, match=r"holds a run already. .* \(there is .*/checkpoints/.*\.ckpt\)"):
        small("fit", "--data.seed", "3")
    with pytest.raises(InputError, match="cannot continue with 4: the order of the samples"):
        small("fit", "--ckpt_path", "last", "--data.global_batch_size", "4", "--trainer.max_steps", "3")
    assert (run / "config.yaml").read_bytes() == config
    small("fit", "--ckpt_path", "last", "--trainer.max_steps", "3")
    assert step_of(run / "checkpoints" / "last.ckpt") == 3
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["max_steps"] == 3
    small("validate", "--config", str(run / "config.yaml"), "--ckpt_path", str(run))
    assert "val/loss" in capsys.readouterr().out


def test_a_run_without_a_checkpoint_is_not_written_over(command, tmp_path):
    (tmp_path / "data").mkdir()  # not of a run
    assert trace_of_a_run(tmp_path, []) is None
    for trace in ("events.out.tfevents.1.2.3", "nonfinite.json", "samples/step-00000002.png", "config.yaml"):
        (tmp_path / trace).parent.mkdir(exist_ok=True)
        (tmp_path / trace).write_bytes(b"precious")
        assert trace_of_a_run(tmp_path, [tmp_path / "checkpoints"]) == tmp_path / trace
    with pytest.raises(
        InputError, match=r"holds a run already\. .*config.yaml; it has no checkpoint, .* starts it anew"
    ):
        command("fit")
    assert command("fit", "--ckpt_path", "last")["ckpt_path"] is None


def test_checkpoint_periods_are_settings_of_their_own(command, monkeypatch):
    built = []
    monkeypatch.setattr(
        DitlitCLI, "after_instantiate_classes", lambda cli: built.extend(cli.trainer.checkpoint_callbacks)
    )
    command("fit", "--save_every", "7", "--keep_every", "9")
    assert [(type(c), c.filename, c._every_n_train_steps) for c in built] == [
        (KeptCheckpoints, "{step:08d}", 9), (LastCheckpoint, "last", 7),
    ]  # fmt: skip
    built.clear()
    command("fit", "--trainer.enable_checkpointing", "false")
    assert not built
    with pytest.raises(InputError, match="save_every must be positive, got 0"):
        command("fit", "--save_every", "0")


# Which checkpoint is meant -------------------------------------------------------------------------------------------


@pytest.fixture
def trained(make_module, make_trainer, datamodule, tmp_path):
    """A run in ``run`` that has kept its best checkpoint."""
    best = ModelCheckpoint(tmp_path / "run" / "checkpoints", "{step}", monitor="val/loss", every_n_train_steps=2)
    make_trainer(
        callbacks=[best, LastCheckpoint(dirpath=tmp_path / "run" / "checkpoints")], enable_checkpointing=True,
        plugins=[CheckpointFiles()], val_check_interval=2, logger=CSVLogger(tmp_path / "run"),
    ).fit(make_module(), datamodule)  # fmt: skip
    return tmp_path / "run"


def test_a_folder_and_the_best_are_found(trained, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("ditlit.resilience.run_folder.rank_zero_info", said.append)
    folders = [trained / "checkpoints"]
    for folder in (trained, *folders):
        assert find_checkpoint(str(folder), "fit", folders) == str(folders[0] / "last.ckpt")
        assert f"{folder} is a folder: taking {folders[0]}/last.ckpt, step 4" in said[-1]
    with pytest.raises(InputError, match=r"there is no best checkpoint in .*no ModelCheckpoint of this run monitors"):
        find_checkpoint("best", "test", [tmp_path / "empty"])
    trained.rename(tmp_path / "moved")
    (best,) = (tmp_path / "moved" / "checkpoints").glob("step=*.ckpt")
    assert find_checkpoint("best", "test", [best.parent]) == str(best)
    assert said[-1] == f"Taking {best}, the best by val/loss."


@pytest.mark.parametrize("name", ["released.pt", "ours.safetensors", "diffusers", "converted.ckpt"])
def test_weights_alone_are_named_with_the_option_that_takes_them(source, tmp_path, name):
    path = tmp_path / name
    convert(source(scrambled(hidden_size=384, num_heads=6, depth=1)), str(path))
    takes = {"fit": "--model.init_from", "validate": "evaluate loss --ckpt", "predict": "ditlit sample --ckpt"}
    if name == "converted.ckpt":  # which has all that the others need
        assert find_checkpoint(str(path), "validate", []) == str(path)
        takes = {"fit": takes["fit"]}
    for command, option in takes.items():
        said = rf"^--ckpt_path {path} holds weights only \(.*\), not a run: .*{option} {path}$"
        with pytest.raises(InputError, match=said):
            find_checkpoint(str(path), command, [])


def test_what_is_no_checkpoint_is_refused_before_anything_runs(command, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(InputError, match="is no checkpoint of a run"):
        find_checkpoint(str(tmp_path / "empty"), "fit", [])
    with pytest.raises(InputError, match="cannot be read as a checkpoint"):
        command("fit", "--ckpt_path", str(tmp_path / "text.pt"))
