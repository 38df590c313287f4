"""How many processes there are, and what one of them decides for all."""

import os
import sys
from collections.abc import Callable
from typing import TypeVar

from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy

from ditlit.parallel.fsdp2 import FSDP2

T = TypeVar("T")


def launched(trainer: Namespace) -> dict[str, int]:
    """Nodes and devices for which torchrun or srun has started processes, where the user names no others.

    Args:
        trainer: the user's settings of the Trainer.
    """
    if TorchElasticEnvironment.detect():
        number = {"num_nodes": os.environ["GROUP_WORLD_SIZE"], "devices": os.environ["LOCAL_WORLD_SIZE"]}
    elif SLURMEnvironment.detect() and "SLURM_STEP_NUM_NODES" in os.environ:  # without srun nobody starts the others
        number = {"num_nodes": os.environ["SLURM_STEP_NUM_NODES"]}
    else:
        number = {}
    open_settings = [name for name, value in (("num_nodes", 1), ("devices", "auto")) if trainer[name] == value]
    return {name: int(value) for name, value in number.items() if name in open_settings}


def decided_by_rank_0(trainer: Trainer, decide: Callable[[], T]) -> T:
    """What ``decide`` gives on rank 0, told to all: what each looked up by itself might differ on a shared disk.

    Processes that Lightning is to start are started now, and meet. An error of rank 0 ends the others without a word.
    """
    strategy = trainer.strategy
    launcher = strategy.launcher  # None where the processes run already, and one that forks them has them inherit
    forks = launcher is not None and launcher.is_interactive_compatible
    if not isinstance(strategy, DDPStrategy | FSDP2) or trainer.world_size == 1 or forks:
        return decide()

    def together() -> T:
        strategy.setup_distributed()
        strategy.accelerator.setup_device(strategy.root_device)  # on which NCCL communicates
        decision, error = None, None
        if strategy.is_global_zero:
            try:
                decision = decide()
            except Exception as caught:
                error = caught
        decision, failed = strategy.broadcast((decision, error is not None))
        if error is not None:
            raise error
        if failed:
            sys.exit(2)
        return decision

    return together() if launcher is None else launcher.launch(together)
