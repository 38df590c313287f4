"""A run on 2 and 4 processes, whole (DDP) or in shards (FSDP2), is the run on one, and continues on any number."""

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from PIL import Image
from ranks import fit, run, srun, write_config
from runs import assert_same
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

from ditlit import checkpoints
from ditlit.errors import InputError
from ditlit.parallel.ddp import SYNC_BUFFERS, prepare_ddp
from ditlit.parallel.fsdp2 import split
from ditlit.parallel.processes import launched
from ditlit.resilience.checkpoint_files import step_of

STATES = ("state_dict", "current_model_state")
GATHERED_ONCE = {"class_path": "ditlit.parallel.FSDP2", "init_args": {"reshard_after_forward": False}}


@pytest.fixture(scope="module")
def one(tmp_path_factory, store):
    return fit(tmp_path_factory.mktemp("one") / "run", store, 1, "auto")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, store):
    return fit(tmp_path_factory.mktemp("sharded") / "run", store, 2, "fsdp2")


def checkpoint(folder: Path, step: int = 6) -> dict:
    return torch.load(folder / "checkpoints" / f"step={step}.ckpt")


def norms(folder: Path) -> list[list[float]]:
    return [[float(x) for x in path.read_text().split()] for path in sorted(folder.glob("norms*.txt"))]


def shapes(tree):
    """A checkpoint with the shape and type of each tensor in its place."""
    if isinstance(tree, dict):
        return {key: shapes(value) for key, value in tree.items()}
    return (tuple(tree.shape), tree.dtype) if isinstance(tree, torch.Tensor) else type(tree)


def assert_close(folder: Path, reference: Path, steps: slice = slice(None), atol: float = 2e-6):
    """The same run to the rounding of float32: gradient norms, weights, averages, optimizer, pictures."""
    expected = norms(reference)[0][steps]
    for rank in norms(folder):
        assert rank == pytest.approx(expected, rel=1e-5)
    ours, theirs = checkpoint(folder), checkpoint(reference)
    for state in STATES:
        assert ours[state].keys() == theirs[state].keys()
        for name, value in theirs[state].items():
            torch.testing.assert_close(
                ours[state][name], value, rtol=1e-5, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
            )
    for i, values in theirs["optimizer_states"][0]["state"].items():
        for name, value in values.items():
            torch.testing.assert_close(ours["optimizer_states"][0]["state"][i][name], value, rtol=1e-4, atol=atol)
    grids = [np.asarray(Image.open(f / "samples" / "step-00000006.png"), dtype=int) for f in (folder, reference)]
    assert abs(grids[0] - grids[1]).max() <= 1


@pytest.mark.parametrize(
    ("strategy", "ranks", "accumulate"), [("ddp", 2, 1), ("ddp", 4, 2), (GATHERED_ONCE, 2, 2), ("fsdp2", 4, 1)]
)
def test_any_number_of_processes_trains_the_run_of_one(tmp_path, store, one, strategy, ranks, accumulate):
    folder = fit(tmp_path / "run", store, ranks, strategy, accumulate_grad_batches=accumulate)
    assert len(norms(folder)) == ranks and max(norms(folder)[0]) > 0.3 > min(norms(folder)[0])  # clipped, and not
    assert_close(folder, one)
    assert step_of(folder / "checkpoints" / "last.ckpt") == 6


def test_a_checkpoint_of_shards_is_that_of_any_run(one, sharded):
    ours, theirs = checkpoint(sharded), checkpoint(one)
    assert shapes(ours) == shapes(theirs)
    assert ours["hyper_parameters"] == theirs["hyper_parameters"]
    loaded = [checkpoints.load(folder / "checkpoints" / "step=6.ckpt") for folder in (sharded, one)]
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([3, 500]), torch.tensor([0, 5])
    with torch.no_grad():
        outputs = [model.denoiser(x, t, y) for model in loaded]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


def test_the_end_of_a_run_is_saved_as_its_last_step_is(one, sharded):
    for folder in (one, sharded):
        ours, theirs = torch.load(folder / "checkpoints" / "last.ckpt"), checkpoint(folder)
        assert not (folder / "checkpoints" / "last-previous.ckpt").exists()
        for key in (*STATES, "averaging_state", "optimizer_states", "lr_schedulers", "global_step"):
            assert_same(ours[key], theirs[key], key)
        assert_same(ours["loops"]["fit_loop"], theirs["loops"]["fit_loop"])


@pytest.mark.parametrize(("strategy", "ranks"), [("auto", 1), ("ddp", 2), ("fsdp2", 4)])
def test_a_run_in_shards_continues_on_any_number(tmp_path, store, one, sharded, strategy, ranks):
    path = sharded / "checkpoints" / "step=3.ckpt"
    folder = fit(tmp_path / "run", store, ranks, strategy, "--ckpt_path", str(path))
    assert_close(folder, one, slice(3, None))


def test_a_whole_run_continues_in_shards(tmp_path, store, one):
    folder = fit(tmp_path / "run", store, 2, "fsdp2", "--ckpt_path", str(one / "checkpoints" / "step=3.ckpt"))
    assert_close(folder, one, slice(3, None))


def test_a_run_in_shards_continues_as_if_it_had_not_stopped(tmp_path, store, sharded):
    path = sharded / "checkpoints" / "step=3.ckpt"
    folder = fit(tmp_path / "run", store, 2, "fsdp2", "--ckpt_path", str(path))
    continued, whole = checkpoint(folder), checkpoint(sharded)
    for key in (*STATES, "averaging_state", "optimizer_states", "global_step"):
        assert_same(continued[key], whole[key], key)


@pytest.mark.parametrize(("precision", "gradient_checkpointing"), [("32-true", False), ("bf16-mixed", True)])
def test_one_shard_is_the_whole_to_the_bit(tmp_path, store, precision, gradient_checkpointing):
    """Blocks are gathered in bfloat16 where autocast would round their weights: that changes nothing."""
    model = {"denoiser": {"gradient_checkpointing": gradient_checkpointing}}
    folders = [
        fit(tmp_path / strategy, store, 1, strategy, model=model, precision=precision) for strategy in ("auto", "fsdp2")
    ]
    whole, shards = map(checkpoint, folders)
    for key in (*STATES, "optimizer_states"):
        assert_same(whole[key], shards[key], key)
    assert all(value.dtype == torch.float32 for value in shards["current_model_state"].values())
    assert norms(folders[0]) == norms(folders[1])


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_the_first_rank_decides_which_checkpoint_is_the_last(tmp_path, store, one, strategy):
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    shutil.copy(one / "checkpoints" / "step=3.ckpt", folder / "checkpoints")
    config = write_config(folder, store, strategy, callbacks=[{"class_path": "ranks.SeesNoCheckpoint"}])
    words = ["--config", str(config), "--ckpt_path", "last"]
    assert run(2, ["fit", *words], folder) == [0, 0], (folder / "log.txt").read_text()
    assert_close(folder, one, slice(3, None))
    log = (folder / "log.txt").read_text()
    assert log.count("Continuing from") == 1 and "training starts" not in log
    shutil.rmtree(folder / "checkpoints")
    (folder / "log.txt").unlink()
    assert run(2, ["validate", *words], folder) == [2, 2]
    log = (folder / "log.txt").read_text()
    assert log.count("there is no checkpoint in") == 1 and "Traceback" not in log, log


def test_held_out_loss_and_predictions_are_the_same(tmp_path, store, sharded):
    path, said, pictures = sharded / "checkpoints" / "step=6.ckpt", [], []
    as_on_gpus = {"class_path": "ranks.InferenceModeAsOnGPUs"}
    for ranks, strategy in ((1, "auto"), (1, "fsdp2"), (2, "fsdp2")):
        folder = tmp_path / f"{strategy}{ranks}"
        config = write_config(folder, store, strategy, callbacks=[as_on_gpus])
        words = ["--config", str(config), "--ckpt_path", str(path)]
        for command in (["validate"], ["predict", "--data.predict_samples", "4"]):
            assert run(ranks, [*command, *words], folder) == [0] * ranks, (folder / "log.txt").read_text()
        said.append([float(x) for x in re.findall(r"val/\w+\W+([\d.]+)", (folder / "log.txt").read_text())])
        files = sorted((folder / "predictions").glob("*.png"))
        pictures.append(np.stack([np.asarray(Image.open(file), dtype=int) for file in files]))
    assert len(said[0]) == 3 and len(pictures[0]) == 4
    for i in (1, 2):
        assert said[0] == pytest.approx(said[i], rel=1e-5)
        assert abs(pictures[0] - pictures[i]).max() <= 1


def test_torchrun_starts_the_same_run(tmp_path, store, one):
    config = write_config(tmp_path / "run", store, "ddp")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*torchrun, "-m", "ditlit", "fit", "--config", str(config)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert_close(tmp_path / "run", one)
    kept = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["trainer"]
    assert kept["devices"] == "auto" and kept["num_nodes"] == 1  # so that it also runs elsewhere


def test_srun_starts_the_same_run(tmp_path, store, one):
    config = write_config(tmp_path / "run", store, "fsdp2")
    status = run(2, ["fit", "--config", str(config)], tmp_path / "run", launcher=srun)
    assert status == [0, 0], (tmp_path / "run" / "log.txt").read_text()
    assert_close(tmp_path / "run", one)


@pytest.mark.parametrize(("stop", "status"), [(None, [0, 0]), (dict(step=4, rank=1), [128 + signal.SIGTERM, 0])])
def test_no_thread_of_the_communication_outlives_a_command(tmp_path, store, stop, status):
    """It would now and then abort a process that ends, and torchrun would report a finished run as failed."""
    callbacks = [{"class_path": "ranks.SignalAt", "init_args": stop}] if stop else []
    config = write_config(tmp_path, store, "ddp", callbacks=callbacks)
    assert run(2, ["fit", "--config", str(config)], tmp_path) == status, (tmp_path / "log.txt").read_text()
    for file in tmp_path.glob("threads*.txt"):
        threads = file.read_text()
        assert "python" in threads and "gloo" not in threads
    assert len(list(tmp_path.glob("threads*.txt"))) == 2


# Steps that are skipped ----------------------------------------------------------------------------------------------


def poison(steps, rank, row=None):
    return {"class_path": "ranks.Poison", "init_args": dict(steps=steps, rank=rank, row=row)}


def test_all_ranks_skip_a_step_and_name_its_sample(tmp_path, store):
    folders = [
        fit(tmp_path / strategy, store, 2, strategy, callbacks=[poison([3], 1, row=2)]) for strategy in ("ddp", "fsdp2")
    ]
    reports = [json.loads((folder / "nonfinite.json").read_text()) for folder in folders]
    assert reports[0] == reports[1]
    assert [(r["step"], r["first"], len(r["samples"])) for r in reports[0]] == [(4, "the latents themselves", 1)]
    for folder in folders:
        assert all(
            torch.isfinite(torch.tensor(rank)).tolist() == [True] * 3 + [False] + [True] * 2 for rank in norms(folder)
        )
    for state in STATES:
        whole, shards = (checkpoint(folder)[state] for folder in folders)
        for name, value in whole.items():
            torch.testing.assert_close(shards[name], value, rtol=1e-5, atol=2e-6)


def test_a_broken_gradient_in_shards_is_traced(tmp_path, store):
    folder = fit(tmp_path / "run", store, 2, "fsdp2", callbacks=[poison([3, 4], 1)])
    first, second = json.loads((folder / "nonfinite.json").read_text())
    assert first["first"] == "the gradient of final.linear.bias" and len(first["samples"]) == 8
    assert second["first"] == "not seen when the step is computed again"  # it is broken no more


def test_shards_go_back_to_a_checkpoint(tmp_path, store):
    """Also where checkpoints are written in the background."""
    words = ("--model.max_bad_steps", "2", "--save_in_background", "true")
    folder = fit(tmp_path / "run", store, 2, "fsdp2", *words, callbacks=[poison([3, 4], 1, row=0)])
    assert "went back to the weights of" in (folder / "log.txt").read_text()
    before, after = checkpoint(folder, 3), checkpoint(folder, 6)
    for key in (*STATES, "averaging_state", "optimizer_states"):
        assert_same(before[key], after[key], key)


# Mistakes, and what is chosen for the user ---------------------------------------------------------------------------


def test_a_batch_that_does_not_divide_is_refused(tmp_path, store):
    config = write_config(tmp_path / "run", store, "fsdp2")
    words = ["--config", str(config), "--data.global_batch_size", "6"]
    assert run(4, ["fit", *words], tmp_path / "run") == [2] * 4
    message = (
        "global_batch_size 6 does not divide evenly over 4 devices and 1 accumulated batch; choose a multiple of 4"
    )
    assert message in (tmp_path / "run" / "log.txt").read_text()


def test_what_cannot_be_sharded_is_refused(make_module, make_trainer):
    for strategy in (ModelParallelStrategy(), FSDPStrategy()):
        with pytest.raises(
            InputError, match=f"{type(strategy).__name__} is not supported: use --trainer.strategy fsdp2"
        ):
            split(make_module().denoiser, strategy)
    with pytest.raises(InputError, match=r"does not train with trainer.precision 64-true; choose one of 32-true"):
        make_trainer(strategy="fsdp2", precision="64-true").strategy.setup_environment()


@torch._dynamo.config.patch(optimize_ddp=True)  # put back afterwards
def test_ddp_is_set_up_for_a_dit_unless_the_user_chose(make_module, make_trainer):
    def chosen(strategy="ddp", module=make_module(), **changes):
        trainer = make_trainer(strategy=strategy, devices=2, **changes)
        prepare_ddp(trainer, module)
        return {name: trainer.strategy._ddp_kwargs.get(name) for name in ("gradient_as_bucket_view", "static_graph")}

    assert chosen() == {"gradient_as_bucket_view": True, "static_graph": True}
    assert chosen(accumulate_grad_batches=2) == {"gradient_as_bucket_view": True, "static_graph": None}
    assert chosen(module=make_module(compile=True))["static_graph"] is None
    other = make_module()
    other.denoiser = torch.nn.Linear(1, 1)
    assert chosen(module=other) == {"gradient_as_bucket_view": True, "static_graph": None}
    mine = DDPStrategy(gradient_as_bucket_view=False, static_graph=False)
    assert chosen(mine) == {"gradient_as_bucket_view": False, "static_graph": False}
    trainer = make_trainer(strategy="ddp_bf16", devices=2)
    prepare_ddp(trainer, make_module(compile=True))
    assert trainer.strategy._ddp_comm_hook is bf16_compress_hook and not torch._dynamo.config.optimize_ddp
    assert trainer.strategy._ddp_kwargs[SYNC_BUFFERS] is False
    with pytest.raises(InputError, match="cannot accumulate batches with static_graph"):
        chosen(DDPStrategy(static_graph=True), accumulate_grad_batches=2)


def test_nodes_and_devices_are_those_of_the_launcher(monkeypatch):
    defaults, mine = Namespace(num_nodes=1, devices="auto"), Namespace(num_nodes=3, devices=2)
    assert launched(defaults) == {}
    slurm = {"SLURM_NTASKS": "16", "SLURM_JOB_NAME": "train", "SLURM_NNODES": "2"}
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    assert launched(defaults) == {}  # a batch script without srun
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "2")
    assert launched(defaults) == {"num_nodes": 2} and launched(mine) == {}
    torchrun = {"TORCHELASTIC_RUN_ID": "x", "GROUP_WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "8"}
    for name, value in torchrun.items():
        monkeypatch.setenv(name, value)
    assert launched(defaults) == {"num_nodes": 4, "devices": 8} and launched(mine) == {}
