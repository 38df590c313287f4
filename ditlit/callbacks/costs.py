"""What training takes beside the steps themselves: memory, and time in which the loop waits for data."""

import os
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.profilers import PassThroughProfiler, Profiler


def memory_in_use(device: torch.device) -> int | None:
    """Bytes: the most that tensors have taken of a GPU so far, else what this process takes, where the system tells.

    It waits for no device.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None


class WaitForData(Profiler):
    """Seconds that the training loop waits for batches; all else is left to the profiler that it stands in for.

    Args:
        profiler: of the trainer.
    """

    action = "[_TrainingEpochLoop].train_dataloader_next"

    def __init__(self, profiler: Profiler | None = None):
        super().__init__()
        self.profiler = profiler or PassThroughProfiler()
        self.seconds = 0.0
        self._started = 0.0

    def start(self, action_name: str) -> None:
        if action_name == self.action:
            self._started = time.perf_counter()
        self.profiler.start(action_name)

    def stop(self, action_name: str) -> None:
        self.profiler.stop(action_name)
        if action_name == self.action:
            self.seconds += time.perf_counter() - self._started

    def summary(self) -> str:
        return self.profiler.summary()

    def describe(self) -> None:
        self.profiler.describe()

    def setup(self, *args: Any, **kwargs: Any) -> None:
        self.profiler.setup(*args, **kwargs)

    def teardown(self, *args: Any, **kwargs: Any) -> None:
        self.profiler.teardown(*args, **kwargs)
