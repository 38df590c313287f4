"""Commands on many devices: one process each, started by Lightning, torchrun or SLURM."""

import os
import sys
from collections.abc import Sequence
from types import TracebackType

import torch.distributed as dist
from lightning.fabric import Fabric
from tqdm import tqdm

from ditlit.data.workers import lost_worker
from ditlit.errors import InputError

FAILED = "ditlit/failed"


def launch(accelerator: str, devices: str, num_nodes: int, precision: str = "32-true") -> tuple[Fabric, int]:
    """Start the processes; returns Fabric and the number of processes of this machine.

    Raises:
        InputError: for devices that this machine does not have.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:  # under torchrun its own numbers hold
        devices = os.environ["LOCAL_WORLD_SIZE"]
        num_nodes = int(os.environ["WORLD_SIZE"]) // int(devices)
    try:
        fabric = Fabric(accelerator=accelerator, devices=devices, num_nodes=num_nodes, precision=precision)
    except (RuntimeError, ValueError, TypeError) as error:  # a device that is not there, a number that is none
        raise InputError(f"accelerator {accelerator}, devices {devices}: {error}") from error
    fabric.launch()
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


class Together:
    """Work that processes share, with a part for each: where one fails, the others stop at their next step.

    The first process then says why; without this they would wait for the failed one where they next meet.

    Args:
        fabric: of the processes; all of them make one, and enter and leave it together.
    """

    def __init__(self, fabric: Fabric):
        self.fabric = fabric
        self.store: dist.Store | None = None
        if fabric.world_size > 1:
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = dist.TCPStore(address, port, is_master=False)
            self.store = dist.PrefixStore(fabric.broadcast(os.urandom(8).hex()), store)

    def step(self) -> None:
        """To be called now and then.

        Raises:
            FailedElsewhere: where another process cannot go on.
        """
        if self.store is not None and self.store.check([FAILED]):
            raise FailedElsewhere

    def __enter__(self) -> "Together":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self.store is None or (error is not None and not isinstance(error, Exception)):
            return
        reasons = {}
        if error is not None and not isinstance(error, FailedElsewhere):
            foreseen = lost_worker(error) or (str(error) if isinstance(error, (InputError, OSError)) else None)
            reasons[self.fabric.global_rank] = foreseen or repr(error)
            self.store.set(FAILED, "")
        reasons = gathered(reasons, self.fabric)
        if not reasons or (self.fabric.global_rank in reasons and (self.fabric.global_rank == 0 or foreseen is None)):
            return  # with the error of this process
        if self.fabric.global_rank != 0:
            sys.exit(2)  # the first process says why
        raise InputError(reasons[min(reasons)]) from None


class FailedElsewhere(Exception):
    """Another process cannot go on."""


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
