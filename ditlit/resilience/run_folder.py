"""The folder of a run: ``trainer.default_root_dir``, whatever loggers there are, and what is found in it."""

from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from ditlit import checkpoints
from ditlit.checkpoints.torch_files import plain_data
from ditlit.errors import InputError
from ditlit.resilience.checkpoint_files import newest_complete

CONFIG = "config.yaml"
# What only a run leaves in its folder.
TRACES = (CONFIG, "checkpoints/*", "samples/*", "evaluations/*", "nonfinite.json", "events.out.tfevents.*")
CHECKPOINT = {"state_dict", "hyper_parameters", "latents", "global_step"}
TO_CONTINUE = {"optimizer_states", "lr_schedulers", "loops"}
# What takes weights, for each command that takes checkpoints of a run only.
TAKES_WEIGHTS = {
    "fit": "start from them with --model.init_from {}",
    "validate": "compute their loss with ditlit evaluate loss --ckpt {}",
    "test": "compute their loss with ditlit evaluate loss --ckpt {}",
    "predict": "draw with them by ditlit sample --ckpt {}",
}


def run_folder(trainer: Trainer) -> Path:
    """Where a run keeps its files."""
    return Path(trainer.default_root_dir)


def checkpoint_folders(trainer: Trainer) -> list[Path]:
    """Where a run's checkpoints are: in its own folder, and wherever a ModelCheckpoint is told to write."""
    given = [getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks]
    folders = [run_folder(trainer) / "checkpoints", *(Path(folder) for folder in given if folder)]
    return list(dict.fromkeys(folders))


def trace_of_a_run(folder: Path, checkpoint_folders: list[Path]) -> Path | None:
    """A file that tells that a run has been here, a checkpoint rather than another; None in a fresh folder."""
    saved = (path for place in checkpoint_folders for path in sorted(place.glob("*.ckpt")))
    others = (path for pattern in TRACES for path in sorted(folder.glob(pattern)))
    return next(saved, None) or next(others, None)


# Which checkpoint is meant -------------------------------------------------------------------------------------------


def find_checkpoint(given: str, command: str, folders: list[Path]) -> str:
    """The checkpoint file that ``--ckpt_path`` means, where that is not ``last``.

    Args:
        given: a file; ``best``; or a folder with checkpoints, such as that of a run, for the newest one in it.
        command: that is to use it.
        folders: with this run's checkpoints.

    Raises:
        InputError: where there is no best one, or the file is no checkpoint of a run, with the option that takes it.
    """
    if given == "best":
        path = best_checkpoint(folders)
    elif Path(given).is_dir():
        path = newest_in(Path(given))
    else:
        path = Path(given)
    if path.exists() and not is_sharded(path):
        check_is_of_a_run(path, command)
    return str(path)


def best_checkpoint(folders: list[Path]) -> Path:
    """The best one by the metric that a ModelCheckpoint of this run monitors, as the newest checkpoint says."""
    found = newest_complete(folders)
    states = plain_data(found[0]).get("callbacks", {}) if found is not None and found[0].is_file() else {}
    for state in states.values():
        if isinstance(state, dict) and state.get("monitor") and state.get("best_model_path"):
            best = Path(state["best_model_path"])
            for path in (best, *(folder / best.name for folder in folders)):  # the folder may have been moved
                if path.exists():
                    rank_zero_info(f"Taking {path}, the best by {state['monitor']}.")
                    return path
    raise InputError(
        f"there is no best checkpoint in {folders[0]}: no ModelCheckpoint of this run monitors a metric; give another "
        "one with --ckpt_path"
    )


def newest_in(folder: Path) -> Path:
    """The newest whole checkpoint in a folder or the ``checkpoints`` in it; the folder itself where there is none."""
    found = None if is_sharded(folder) else newest_complete([folder, folder / "checkpoints"])
    if found is None:
        return folder
    rank_zero_info(f"{folder} is a folder: taking {found[0]}, step {found[1]}, its newest whole checkpoint.")
    return found[0]


def is_sharded(path: Path) -> bool:
    """Whether this is a sharded checkpoint, as Lightning's own strategies write them."""
    return (path / "meta.pt").is_file()


def check_is_of_a_run(path: Path, command: str) -> None:
    """Refuse weights alone where ``command`` needs a checkpoint that training has written."""
    bare = path.is_dir() or path.suffix == ".safetensors"
    content = {} if bare else plain_data(path)
    needed = CHECKPOINT | TO_CONTINUE if command == "fit" else CHECKPOINT
    if isinstance(content, dict) and needed <= content.keys():
        return
    remedy = TAKES_WEIGHTS[command].format(path)
    try:
        what = f"holds weights only ({checkpoints.read(path).format}), not a run: {remedy}"
    except InputError as error:
        what = f"is no checkpoint of a run ({error}); if it holds weights, {remedy}"
    raise InputError(f"--ckpt_path {path} {what}")
