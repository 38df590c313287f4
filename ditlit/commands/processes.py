"""Commands on many devices: one process each, started by Lightning, torchrun or SLURM."""

import functools
import os
from collections.abc import Callable, Sequence
from typing import ParamSpec

import torch.distributed as dist
from lightning.fabric import Fabric
from tqdm import tqdm

from ditlit.errors import InputError
from ditlit.settings import Execution
from ditlit.watchdog import RankWatchdog

P = ParamSpec("P")

_watchdog: RankWatchdog | None = None  # of this process, while a command runs on several


def ending_together(command: Callable[P, None]) -> Callable[P, None]:
    """A command whose processes all end within a minute where one of them fails or dies."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        global _watchdog
        try:
            command(*args, **kwargs)
        except BaseException as error:
            if _watchdog is not None and not isinstance(error, SystemExit):
                _watchdog.fail_with(error)
                _watchdog = None
            raise
        finally:
            if _watchdog is not None:
                _watchdog.end()
                _watchdog = None

    return run


def launch(execution: Execution, precision: str = "32-true") -> tuple[Fabric, int]:
    """Start the processes of a command that is :func:`ending_together`.

    Returns Fabric, and the number of processes of this machine.

    Raises:
        InputError: for devices that this machine does not have.
    """
    accelerator, devices, num_nodes = execution.accelerator, execution.devices, execution.num_nodes
    if "TORCHELASTIC_RUN_ID" in os.environ:  # under torchrun its own numbers hold
        devices = os.environ["LOCAL_WORLD_SIZE"]
        num_nodes = int(os.environ["WORLD_SIZE"]) // int(devices)
    try:
        fabric = Fabric(accelerator=accelerator, devices=devices, num_nodes=num_nodes, precision=precision)
    except (RuntimeError, ValueError, TypeError) as error:  # a device that is not there, a number that is none
        raise InputError(f"accelerator {accelerator}, devices {devices}: {error}") from error
    fabric.launch()
    if fabric.world_size > 1:
        global _watchdog
        ranks = fabric.global_rank, fabric.world_size
        _watchdog = RankWatchdog.among(*ranks, fabric.broadcast, fabric.barrier, "Run the command again to go on")
    return fabric, fabric.world_size // num_nodes


def share(items: Sequence, fabric: Fabric) -> list:
    """This process's part of the items, dealt out in turn."""
    return list(items[fabric.global_rank :: fabric.world_size])


def gathered(part: dict, fabric: Fabric) -> dict:
    """The union of the dicts of all processes, on all of them."""
    if fabric.world_size == 1:
        return part
    parts: list[dict] = [{}] * fabric.world_size
    dist.all_gather_object(parts, part)
    return {key: value for part in parts for key, value in part.items()}


class Progress:
    """A bar over the images of all processes, shown by the first, which takes the others to be as far as itself.

    Args:
        name: of the work.
        total: images, over all processes.
        done: images that are there already.
        mine: images that this process makes.
        fabric: of the processes.
    """

    def __init__(self, name: str, total: int, done: int, mine: int, fabric: Fabric):
        self.todo = total - done
        self.mine = mine
        self.made = 0
        if fabric.world_size > 1:
            name = f"{name} on {fabric.world_size} devices"
        self.bar = tqdm(total=total, initial=done, desc=name, unit=" images", disable=fabric.global_rank != 0)

    def advance(self, n: int) -> None:
        before, self.made = self.made, self.made + n
        self.bar.update(self.todo * self.made // self.mine - self.todo * before // self.mine)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error) -> None:
        self.bar.close()
