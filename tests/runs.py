"""Runs of the command line that are killed, continued and compared."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch
import yaml


def start(folder: Path, store: str, devices: int, resume: bool = False, **kill) -> subprocess.Popen:
    """Start the command line in a process group of its own. ``kill`` goes to RecordLosses."""
    folder.mkdir(exist_ok=True)
    config = {
        "model": {
            "denoiser": {
                "class_path": "ditlit.models.DiT",
                "init_args": dict(
                    input_size=8, in_channels=3, num_classes=5, patch_size=4, hidden_size=16, depth=2, num_heads=2,
                    dropout=0.1, positions="learned",
                ),
            },
            "lr_scheduler": {"class_path": "torch.optim.lr_scheduler.LinearLR", "init_args": {"total_iters": 20}},
            "ema": {"class_path": "ditlit.training.EMA", "init_args": {"decay": 0.9, "warmup": True}},
        },
        "data": {
            "class_path": "ditlit.data.LatentDataModule",
            # 30 training samples: epochs of 3 steps, so that steps 3k + 1 and 3k + 2 lie within an epoch.
            "init_args": dict(store=store, val_size=10, global_batch_size=8),
        },
        "trainer": {
            "accelerator": "cpu",
            "devices": devices,
            "strategy": "ddp" if devices > 1 else "auto",
            "default_root_dir": str(folder),
            "max_steps": 14,
            "max_epochs": -1,
            "accumulate_grad_batches": 2,
            "gradient_clip_val": 0.5,
            "log_every_n_steps": 1,
            "check_val_every_n_epoch": None,
            "val_check_interval": 4,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [
                {"class_path": "losses.RecordLosses", "init_args": {"folder": str(folder)} | kill},
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": dict(filename="last", every_n_train_steps=4, enable_version_counter=False),
                },
            ],
        },
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "ditlit", "fit", "--config", str(folder / "run.yaml")]
    command += ["--ckpt_path", "last"] if resume else []
    with open(folder / "log.txt", "a") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def fit(folder: Path, store: str, devices: int, resume: bool = False, **kill) -> int:
    """Run the command line to its end; returns the exit status."""
    process = start(folder, store, devices, resume, **kill)
    try:
        return process.wait(timeout=120)
    finally:
        if process.poll() is None or process.returncode < 0:  # the other ranks too
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def losses(folder: Path) -> dict[str, list[str]]:
    return {path.name: path.read_text().splitlines() for path in sorted(folder.glob("rank*.txt"))}


def assert_same(a, b, where="checkpoint"):
    """Equal trees of plain values and tensors, bit for bit."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}.{i}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where
