"""A fault campaign: small trainings that are killed, stopped, damaged and starved of disk space at random moments.

    python tests/benchmarks/faults.py --runs 50 --seed 0

Every run meets one to three faults, is continued with ``--ckpt_path last`` after each, and must end with the weights,
moving average and optimizer of the undisturbed run, bit for bit. The faults, on 1 and 2 processes:

    kill      SIGKILL to any of the processes
    stop      SIGTERM to any of them: nothing may be lost
    corrupt   SIGKILL, then a byte of the newest checkpoint is changed
    truncate  SIGKILL, then the newest checkpoint is cut short
    full      the disk is full for some steps (a limit on the size of files stands for it), then SIGKILL

The seed fixes the plan; the moment within a step is the machine's.
"""

import argparse
import contextlib
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
import yaml
from lightning.pytorch import Callback

from ditlit.data import write_store
from ditlit.resilience.checkpoint_files import newest_complete

FAULTS = ("kill", "stop", "corrupt", "truncate", "full")
STEPS, EVERY = 60, 3
PATIENCE = 60  # seconds in which all processes of a run with a fault must have ended
OPTIONS = argparse.Namespace(strategy="ddp", save_in_background=False)  # of the command line
SAME = ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers")


class Pace(Callback):
    """Writes down process ids and steps for the campaign, slows the steps down, and may fill the disk for some."""

    def __init__(self, folder: str, full_from: int = -1, full_for: int = 0):
        self.folder = Path(folder)
        self.full_from = full_from
        self.full_for = full_for

    def on_train_start(self, trainer, pl_module):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        (self.folder / f"pid{trainer.global_rank}").write_text(str(os.getpid()))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        time.sleep(0.01)
        if self.full_for:
            full = self.full_from <= trainer.global_step < self.full_from + self.full_for
            limit = 100_000 if full else resource.RLIM_INFINITY  # less than a checkpoint, more than the logs
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        if trainer.is_global_zero:
            progress = self.folder / ".step"
            progress.write_text(str(trainer.global_step))
            os.replace(progress, self.folder / "step")


def start(folder: Path, store: Path, devices: int, full: tuple[int, int] = (-1, 0)) -> subprocess.Popen:
    """Start or continue the training in ``folder``, in a process group of its own."""
    for name in ("step", "pid0", "pid1"):
        (folder / name).unlink(missing_ok=True)
    sizes = dict(input_size=8, in_channels=3, num_classes=5, patch_size=4, hidden_size=32, depth=2, num_heads=2)
    pace = {"folder": str(folder), "full_from": full[0], "full_for": full[1]}
    save = dict(filename="last", every_n_train_steps=EVERY, enable_version_counter=False)
    config = {
        "model": {
            "denoiser": {"class_path": "ditlit.models.DiT", "init_args": sizes | {"dropout": 0.1}},
            "lr_scheduler": {"class_path": "torch.optim.lr_scheduler.LinearLR", "init_args": {"total_iters": 40}},
            "ema": {"class_path": "ditlit.training.EMA", "init_args": {"decay": 0.9, "warmup": True}},
        },
        "data": {
            "class_path": "ditlit.data.LatentDataModule",
            "init_args": dict(store=str(store), val_size=10, global_batch_size=8),
        },
        "trainer": {
            "accelerator": "cpu", "devices": devices, "strategy": OPTIONS.strategy if devices > 1 else "auto",
            "default_root_dir": str(folder), "max_steps": STEPS, "max_epochs": -1, "accumulate_grad_batches": 2,
            "check_val_every_n_epoch": None, "val_check_interval": 20, "log_every_n_steps": 1,
            "enable_progress_bar": False, "enable_model_summary": False,
            "callbacks": [
                {"class_path": "faults.Pace", "init_args": pace},
                {"class_path": "ditlit.callbacks.TrainingMonitor"},
                {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": save},
            ],
        },
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "ditlit", "fit", "--config", str(folder / "run.yaml"), "--ckpt_path", "last"]
    command += ["--save_in_background", str(OPTIONS.save_in_background).lower()]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    with open(folder / "log.txt", "a") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def wait(process: subprocess.Popen, seconds: float) -> int | None:
    """The exit status once no process of the run is left; None, after killing them, where some are left too long."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        status = process.poll()
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return status
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return None


def steps_done(folder: Path) -> int:
    try:
        return int((folder / "step").read_text())
    except FileNotFoundError:
        return 0


def newest_step(folder: Path) -> int:
    found = newest_complete([folder / "checkpoints"])
    return 0 if found is None else found[1]


def suffer(fault: str, folder: Path, store: Path, devices: int, rng: random.Random) -> int:
    """One start that meets the fault; returns how many steps were lost.

    Raises:
        AssertionError: where the run answers it in the wrong way.
    """
    begun = newest_step(folder)
    at = rng.randint(min(begun + 2, STEPS - 4), STEPS - 4)
    full = (max(at - rng.randint(1, 12), 0), rng.randint(3, 9)) if fault == "full" else (-1, 0)
    process = start(folder, store, devices, full)
    while steps_done(folder) < at:
        time.sleep(0.002)
        if process.poll() is not None:
            wait(process, PATIENCE)
            raise AssertionError("ended before the fault")
    time.sleep(rng.uniform(0, 0.06))
    rank = rng.randrange(devices)
    victim = int((folder / f"pid{rank}").read_text())
    with contextlib.suppress(ProcessLookupError):
        os.kill(victim, signal.SIGTERM if fault == "stop" else signal.SIGKILL)
    status = wait(process, PATIENCE)
    reached = steps_done(folder)
    assert status is not None, f"still running {PATIENCE} s after the fault in rank {rank}"
    if fault == "stop":
        assert status in (0, 128 + signal.SIGTERM), f"exit status {status} after SIGTERM"
        assert newest_step(folder) == reached, f"stopped after step {reached} with step {newest_step(folder)} saved"
    elif fault in ("corrupt", "truncate"):
        damage(fault, folder, rng)
    return reached - newest_step(folder)


def damage(fault: str, folder: Path, rng: random.Random) -> None:
    """Change a byte of the newest checkpoint, or cut it short; not where it is the only one."""
    found = newest_complete([folder / "checkpoints"])
    if found is None or len(list((folder / "checkpoints").glob("*.ckpt"))) < 2:
        return
    size = found[0].stat().st_size
    with open(found[0], "r+b") as file:
        if fault == "truncate":
            file.truncate(rng.randrange(size))
            return
        file.seek(rng.randrange(size))
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 0xFF]))


def same(a, b) -> bool:
    """Whether two trees of plain values and tensors are equal, bit for bit."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def final_state(folder: Path) -> dict:
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == STEPS, f"ended at step {checkpoint['global_step']}"
    return {name: checkpoint[name] for name in SAME}


def finish(folder: Path, store: Path, devices: int) -> dict:
    """Run to the end; the state there."""
    status = wait(start(folder, store, devices), 300)
    assert status == 0, f"exit status {status}"
    return final_state(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="where runs and logs stay; by default they are removed")
    parser.add_argument("--strategy", choices=("ddp", "fsdp2"), default="ddp", help="of the runs on 2 processes")
    parser.add_argument("--save_in_background", action="store_true", help="write checkpoints while training goes on")
    args = parser.parse_args(namespace=OPTIONS)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(args.folder or temporary)
        root.mkdir(parents=True, exist_ok=True)
        sys.exit(campaign(root, args.runs, args.seed))


def campaign(root: Path, runs: int, seed: int) -> int:
    """Run all and print the table; returns the number of runs that did not end as the undisturbed one."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(40, 3, 8, 8, generator=generator)
    write_store(root / "store", latents, torch.arange(40) % 5, 5)
    reference: dict[int, dict] = {}
    met: dict[tuple[str, int], list[int]] = defaultdict(list)  # steps lost
    identical: dict[int, int] = defaultdict(int)
    failures = []
    for run in range(runs):
        rng = random.Random(f"{seed}/{run}")
        devices = 1 + run % 2
        if devices not in reference:
            folder = root / f"whole-{devices}"
            folder.mkdir()
            reference[devices] = finish(folder, root / "store", devices)
        folder = root / f"run-{run:03d}"
        folder.mkdir()
        plan = [FAULTS[run // 2 % len(FAULTS)], *rng.choices(FAULTS, k=rng.choice((0, 0, 1, 2)))]
        try:
            for fault in plan:
                met[fault, devices].append(suffer(fault, folder, root / "store", devices, rng))
            if not same(finish(folder, root / "store", devices), reference[devices]):
                raise AssertionError("ended with other weights")
            identical[devices] += 1
            outcome = "identical"
        except Exception as error:
            outcome = f"FAILED: {error}"
            failures.append(f"run {run} ({', '.join(plan)}; {devices} processes): {error}")
        print(
            f"run {run:3d}  {devices} process{'es' if devices > 1 else '  '}  {', '.join(plan):32s} {outcome}",
            flush=True,
        )

    print(f"\n{'fault':10s}{'processes':>10s}{'times':>8s}{'steps lost: mean':>18s}{'most':>6s}")
    for (fault, devices), lost in sorted(met.items()):
        print(f"{fault:10s}{devices:10d}{len(lost):8d}{sum(lost) / len(lost):18.1f}{max(lost):6d}")
    for devices in sorted(reference):
        total = len(range(devices - 1, runs, 2))
        print(
            f"{identical[devices]} of {total} runs on {devices} process(es) ended bit-identical to the undisturbed run"
        )
    print(*failures, sep="\n")
    return len(failures)


if __name__ == "__main__":
    main()
