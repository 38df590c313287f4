"""A place of its own for every test, a small latent store, and a module small enough to train in a test."""

import logging
import os
import sys
import warnings

import environment  # noqa: F401  before all that reads it
import pytest
import torch
from lightning.pytorch import Trainer
from weights import LATENTS, contents_of

from ditlit import checkpoints
from ditlit.checkpoints.safetensors_files import write_safetensors
from ditlit.cli import DitlitCLI
from ditlit.data import LatentDataModule, write_store
from ditlit.diffusion import GaussianDiffusion, Sampling
from ditlit.models import DiT
from ditlit.training import EMA, DiTModule

N, SHAPE, K = 40, (3, 8, 8), 5


# Files that take longest, which begin first, so that no core waits for the other at the end.
SLOWEST = ("resume", "notebooks", "many_devices", "cli", "encode", "heartbeat", "sample", "streaming", "evaluate")


def pytest_collection_modifyitems(items):
    places = {f"test_{name}.py": place for place, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture(autouse=True, scope="session")
def away(tmp_path_factory):
    """Fixtures that many tests share work in an empty folder too."""
    folder = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("elsewhere"))
    yield
    os.chdir(folder)


@pytest.fixture(autouse=True)
def apart(tmp_path_factory):
    """Every test in an empty working folder and with an empty home, and with the environment as before the others."""
    before = dict(os.environ)
    folder = os.getcwd()
    os.environ["HOME"] = str(tmp_path_factory.mktemp("home"))
    os.chdir(tmp_path_factory.mktemp("elsewhere"))
    yield
    os.chdir(folder)
    os.environ.clear()
    os.environ |= before


@pytest.fixture(autouse=True)
def quiet():
    """Lightning's hints about hardware and workers are not what is tested."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """Moments of 40 samples in 5 classes, shifted and scaled, in three shards."""
    folder = tmp_path_factory.mktemp("data") / "store"
    generator = torch.Generator().manual_seed(0)
    mean, std = torch.randn(N, *SHAPE, generator=generator), torch.rand(N, *SHAPE, generator=generator)
    write_store(folder, torch.cat([mean, std], 1).half(), torch.arange(N) % K, K,
                kind="moments", shard_size=16, shift=[0.5], scale=[0.3, 0.4, 0.5])  # fmt: skip
    return str(folder)


@pytest.fixture
def datamodule(store):
    return LatentDataModule(store, val_size=10, global_batch_size=8, val_batch_size=4)


@pytest.fixture
def make_module():
    def make(seed=0, decay=0.9, warmup=False, **changes) -> DiTModule:
        torch.manual_seed(0)
        sizes = dict(input_size=8, in_channels=3, num_classes=K, patch_size=4, hidden_size=16, depth=2, num_heads=2)
        settings = dict(
            denoiser=DiT(**sizes),
            process=GaussianDiffusion(),
            optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2),
            ema=EMA(decay, warmup),
            sampling=Sampling(num_steps=3),
            seed=seed,
        )
        return DiTModule(**(settings | changes))

    return make


@pytest.fixture
def make_trainer(tmp_path):
    def make(**changes) -> Trainer:
        settings = dict(
            default_root_dir=tmp_path,
            accelerator="cpu",
            devices=1,
            max_steps=4,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            check_val_every_n_epoch=None,
            val_check_interval=1000,
        )
        return Trainer(**(settings | changes))

    return make


@pytest.fixture
def command(monkeypatch, tmp_path):
    """The arguments with which a command line, on a run in ``tmp_path``, would call the trainer."""
    monkeypatch.setattr(DitlitCLI, "_run_subcommand", lambda self, subcommand: None)
    monkeypatch.setattr(sys, "argv", ["ditlit"])

    def arguments(subcommand, *args):
        folder = ["--trainer.default_root_dir", str(tmp_path), "--trainer.accelerator", "cpu"]
        with torch.device("meta"):
            cli = DitlitCLI([subcommand, "--config", "digits.yaml", *folder, *args])
        getattr(cli, f"before_{subcommand}", lambda: None)()
        return cli._prepare_subcommand_kwargs(subcommand)

    return arguments


@pytest.fixture
def source(tmp_path):
    """Writes a model with its configuration as a file of ours."""

    def make(model, process=None, latents=LATENTS, name="source.safetensors"):
        contents = contents_of(model)
        contents.latents = latents
        contents.process = checkpoints.describe(process or GaussianDiffusion())
        contents.step = 400_000
        write_safetensors(contents, tmp_path / name)
        return str(tmp_path / name)

    return make
