"""Checkpoint files that survive crashes and full disks, and the search for the newest one that did."""

import contextlib
import os
import zipfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning_utilities.core.apply_func import apply_to_collection

from ditlit.checkpoints.torch_files import plain_data
from ditlit.errors import InputError

PREVIOUS = "-previous"  # last.ckpt is kept as last-previous.ckpt when it is overwritten
DAMAGED = ".damaged"  # behind the name of a checkpoint that a continued run found broken


class CheckpointFiles(TorchCheckpointIO):
    """Writes checkpoints so that one is always whole, and reads them without running code.

    A checkpoint is written beside its place, flushed to the disk and renamed. The file that it replaces stays, as
    ``NAME-previous.ckpt``, so that there is a second one should the newest be damaged later. Where the disk is full,
    one line says so, the files that exist stay (a file that was to be removed too), and training goes on to the next
    save. Checkpoints at URLs are written as Lightning does.

    Args:
        background: copy a checkpoint to the CPU's memory and write it while training goes on. One is written at a time:
            the next save waits for it, and so do the end of training and all that reads checkpoints.
    """

    def __init__(self, background: bool = False):
        self.background = background
        self._error: OSError | None = None
        self._worker: ThreadPoolExecutor | None = None  # one thread: files are written and removed in turn
        self._unfinished: list[Future] = []

    @property
    def error(self) -> OSError | None:
        """Why the latest save failed, or None where it did not; waits for it to end."""
        self.finish()
        return self._error

    def finish(self) -> None:
        """Wait until what is written in the background is on the disk."""
        unfinished, self._unfinished = self._unfinished, []
        for task in unfinished:
            task.result()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        self.finish()
        if self.background:
            checkpoint = copied(checkpoint)
            self._worker = self._worker or ThreadPoolExecutor(1, "checkpoint")
        self._do(self._save, checkpoint, path, storage_options)

    def load_checkpoint(
        self, path: str | Path, map_location: Callable | None = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """The checkpoint as plain data and tensors on the CPU; ``weights_only`` is always true.

        Raises:
            InputError: where the file is missing or damaged, or holds more than plain data.
        """
        self.finish()
        if "://" in str(path):
            return super().load_checkpoint(path, map_location, weights_only=True)
        return plain_data(path)

    def remove_checkpoint(self, path: str | Path) -> None:
        self._do(self._remove, path)

    def teardown(self) -> None:
        self.finish()
        if self._worker is not None:
            self._worker.shutdown()
            self._worker = None

    def _do(self, task: Callable[..., None], *args: Any) -> None:
        if self._worker is None:
            task(*args)
        else:
            self._unfinished.append(self._worker.submit(task, *args))

    def _save(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any) -> None:
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        self._error = None
        try:
            write(checkpoint, Path(path))
        except OSError as error:
            self._error = error
            rank_zero_warn(
                f"could not save step {checkpoint.get('global_step')} as {path} ({error.strerror or error}); earlier "
                "checkpoints stay and training goes on. Free some space on this disk before the next save"
            )

    def _remove(self, path: str | Path) -> None:
        if self._error is None:  # else the one that should have replaced it is not there
            super().remove_checkpoint(path)


def copied(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """A copy in the CPU's memory; training waits only until all of it is there."""
    copy = apply_to_collection(checkpoint, torch.Tensor, copy_to_cpu)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return copy


def copy_to_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a tensor; from a GPU to pinned memory, several times as fast, and not there yet."""
    if not tensor.is_cuda or not torch.cuda.is_available():
        return tensor.detach().to("cpu", copy=True)
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor.detach(), non_blocking=True)


def write(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint that is at ``path`` whole or not at all, and keep what was there as the previous one.

    Raises:
        OSError: where the disk is full or cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for name in (path.name, previous_of(path).name):
        for abandoned in path.parent.glob(f".{name}.*.tmp"):  # of a run that was killed while saving
            abandoned.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            writer = Writer(file)
            try:
                torch.save(checkpoint, writer)
            except Exception:
                if writer.error is not None:
                    raise writer.error from None  # torch would hide the cause
                raise
            file.flush()
            os.fsync(file.fileno())
        keep_previous(path)
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


class Writer:
    """A file for ``torch.save`` that remembers why a write failed."""

    def __init__(self, file: Any):
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        try:
            self.file.flush()
        except OSError as error:
            self.error = error
            raise


def previous_of(path: Path) -> Path:
    return path.with_name(path.stem + PREVIOUS + path.suffix)


def keep_previous(path: Path) -> None:
    if not path.is_file():
        return
    previous = previous_of(path)
    link = path.with_name(f".{previous.name}.{os.getpid()}.tmp")
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)  # so that there is a file at ``path`` at every moment
        os.replace(link, previous)
    except OSError:  # a file system without hard links
        os.replace(path, previous)
    finally:
        link.unlink(missing_ok=True)  # renaming does nothing where a killed save has left both names for one file


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable, where the file system knows how."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def newest_complete(folders: list[Path], at_most: int | None = None) -> tuple[Path, int, list[Path]] | None:
    """The checkpoint with the most steps that is whole, its step, and the damaged ones that were passed over.

    Of checkpoints at the same step the one written last is taken; those of more than ``at_most`` steps are left out.
    None where there are no checkpoints.

    Raises:
        InputError: where there are checkpoints but none is whole.
    """
    steps: dict[Path, int] = {}
    damaged: list[Path] = []
    for path in sorted({path for folder in folders for path in folder.glob("*.ckpt")}):
        try:
            steps[path] = step_of(path)
        except InputError:
            damaged.append(path)
    if at_most is not None:
        steps = {path: step for path, step in steps.items() if step <= at_most}
    for path in sorted(steps, key=lambda path: (steps[path], path.stat().st_mtime_ns), reverse=True):
        if path.is_dir() or is_intact(path):
            return path, steps[path], damaged
        damaged.append(path)
    if damaged:
        names = ", ".join(map(str, damaged))
        raise InputError(f"no checkpoint of this run is whole ({names}); start again in another folder")
    return None


def set_aside(damaged: list[Path]) -> None:
    """Rename damaged checkpoints, so that the next save does not keep one of them in the place of a whole one."""
    for path in damaged:
        with contextlib.suppress(OSError):
            path.rename(path.with_name(path.name + DAMAGED))


def step_of(path: Path) -> int:
    """Optimizer steps in a checkpoint; reads its directory only.

    Raises:
        InputError: for a file that cannot be read.
    """
    content = plain_data(path / "meta.pt" if path.is_dir() else path)  # a folder is a sharded checkpoint
    try:
        return int(content["global_step"])
    except (TypeError, KeyError, ValueError):
        raise InputError(f"{path} is not a training checkpoint: it has no global_step") from None


def is_intact(path: Path) -> bool:
    """Whether every record of a checkpoint has the checksum that was written with it."""
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except Exception:  # whatever a damaged archive provokes
        return False
