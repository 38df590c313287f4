"""The command line on several ranks, and callbacks that write down what the ranks do."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from lightning.pytorch import Callback
from lightning.pytorch.loops import utilities
from weights import contents_of

from ditlit import cli
from ditlit.checkpoints.safetensors_files import write_safetensors
from ditlit.models import DiT

PRELOADED = ["ditlit.cli", "ditlit.training", "ranks"]  # once for all processes, which makes them start at once


class RecordNorms(Callback):
    """Appends the gradient norm of each optimizer step, before clipping, to a file for each rank."""

    def __init__(self, folder: str):
        self.folder = Path(folder)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            with open(self.folder / f"norms{trainer.global_rank}.txt", "a") as file:
                file.write(f"{pl_module.grad_norm.item()}\n")


class SignalAt(Callback):
    """Sends one rank's process a SIGTERM after a step."""

    def __init__(self, step: int, rank: int):
        self.step, self.rank = step, rank

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (trainer.global_step, trainer.global_rank) == (self.step, self.rank):
            signal.raise_signal(signal.SIGTERM)


class SignalJob(Callback):
    """After a step, sends the workers a signal, and this process too, as a scheduler does: from outside, to all."""

    def __init__(self, step: int, name: str, itself: bool):
        self.step, self.name, self.itself = step, name, itself

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            processes = [child.pid for child in multiprocessing.active_children()] + [os.getpid()] * self.itself
            assert len(processes) > 1
            subprocess.run(["kill", f"-{self.name}", *map(str, processes)], check=True)


class Poison(Callback):
    """Makes a row of one rank's latents infinite in some steps, counted from 0; or a gradient, without a row."""

    def __init__(self, steps: list[int], rank: int, row: int | None = None):
        self.steps, self.rank, self.row = steps, rank, row

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.now = trainer.global_step in self.steps and trainer.global_rank == self.rank
        if self.now and self.row is not None:
            batch["moments"][self.row] = torch.inf

    def on_train_start(self, trainer, pl_module):
        if self.row is None:
            pl_module.denoiser.final.register_forward_hook(self.break_gradient)

    def break_gradient(self, module, args, output):
        if self.now and output.requires_grad:
            output.register_hook(lambda grad: grad * torch.inf)


class InferenceModeAsOnGPUs(Callback):
    """Lightning evaluates in inference mode, which it avoids where gloo communicates."""

    def __init__(self):
        utilities._distributed_is_initialized = lambda: False


class SeesNoCheckpoint(Callback):
    """On the second rank, as where a shared disk shows new files late."""

    def __init__(self):
        if os.environ.get("RANK") == "1":
            cli.newest_complete = lambda folders: None


def torchrun(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What torchrun tells the processes of one machine."""
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1",
        "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "GROUP_WORLD_SIZE": "1", "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
    }  # fmt: skip


def srun(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What srun tells processes on a machine each."""
    return {
        "SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": str(ranks), "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": "0", "SLURM_NODEID": str(rank), "SLURM_NODELIST": "127.0.0.1", "SLURM_NNODES": str(ranks),
        "SLURM_STEP_NUM_NODES": str(ranks), "SLURM_NTASKS_PER_NODE": "1", "MASTER_PORT": str(port),
    }  # fmt: skip


def command(words: list[str], environment: dict[str, str], folder: Path) -> None:
    """What each process does."""
    torch.set_num_threads(1)
    os.chdir(folder)
    os.environ.clear()
    os.environ |= environment
    from ditlit.__main__ import main

    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = ["ditlit", *words]
    try:
        main()
    finally:
        names = filter(None, map(name_of, Path("/proc/self/task").glob("*")))  # of Linux only
        (folder / f"threads{environment.get('RANK', 0)}.txt").write_text("\n".join(names))


def name_of(thread: Path) -> str | None:
    try:
        return (thread / "comm").read_text().strip()
    except OSError:  # it has ended meanwhile
        return None


def run(ranks: int, words: list[str], folder: Path, launcher: Callable = torchrun) -> list[int]:
    """Run a command on so many ranks; the exit status of each, and their output in ``log.txt``."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    environments = [dict(os.environ) | (launcher(rank, ranks, port) if ranks > 1 else {}) for rank in range(ranks)]
    processes = [context.Process(target=command, args=(words, each, folder)) for each in environments]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
    finally:
        for process in processes:
            process.kill()
    return [process.exitcode for process in processes]


SIZES = dict(input_size=8, in_channels=3, num_classes=5, patch_size=4, hidden_size=16, depth=2, num_heads=2)


def write_weights(folder: Path) -> str:
    """Weights to start from in which nothing is zero, so that every gradient counts from the first step."""
    denoiser = DiT(**SIZES, positions="learned")
    generator = torch.Generator().manual_seed(0)
    for p in denoiser.parameters():
        torch.nn.init.normal_(p, std=0.1, generator=generator)
    write_safetensors(contents_of(denoiser), folder / "start.safetensors")
    return str(folder / "start.safetensors")


def write_config(folder: Path, store: str, strategy: str, model: dict | None = None, callbacks=(), **trainer) -> Path:
    """A training of 6 steps with validation, samples and a checkpoint after every third."""
    folder.mkdir(exist_ok=True)
    sizes = SIZES | {"positions": "learned"}
    model = dict(model or {})
    save = dict(filename="{step}", every_n_train_steps=3, save_top_k=-1)
    config = {
        "model": {
            "denoiser": {"class_path": "ditlit.models.DiT", "init_args": sizes | model.pop("denoiser", {})},
            "process": {"class_path": "ditlit.diffusion.GaussianDiffusion", "init_args": {"clip_x0": True}},
            # A large eps: the bias of the keys has no gradient but rounding, which Adam would blow up.
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-2, "eps": 1e-3}},
            "ema": {"class_path": "ditlit.training.EMA", "init_args": {"decay": 0.8}},
            "sampling": {"num_steps": 3, "guidance_scale": 2.0},
            "init_from": write_weights(folder),
            **model,
        },
        "data": {
            "class_path": "ditlit.data.LatentDataModule",
            "init_args": dict(store=store, val_size=8, global_batch_size=8, val_batch_size=2),
        },
        "trainer": {
            "accelerator": "cpu",
            "strategy": strategy,
            "default_root_dir": str(folder),
            "max_steps": 6,
            "max_epochs": -1,
            "gradient_clip_val": 0.3,
            "log_every_n_steps": 3,
            "check_val_every_n_epoch": None,
            "val_check_interval": 3,
            "num_sanity_val_steps": 0,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [
                {"class_path": "ranks.RecordNorms", "init_args": {"folder": str(folder)}},
                {"class_path": "ditlit.callbacks.TrainingMonitor"},
                {"class_path": "ditlit.callbacks.SampleGrid", "init_args": {"classes": [0, 1], "per_class": 2}},
                {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": save},
                *callbacks,
            ],
            **trainer,
        },
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def fit(folder: Path, store: str, ranks: int, strategy: str, *words: str, **settings) -> Path:
    """Train to the end; returns the folder. Settings go to :func:`write_config`."""
    config = write_config(folder, store, strategy, **settings)
    status = run(ranks, ["fit", "--config", str(config), *words], folder)
    assert status == [0] * ranks, (folder / "log.txt").read_text()
    return folder
