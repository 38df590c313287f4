"""Moments on a device, spreads of durations, and peaks of memory."""

import ctypes
import gc
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

PROCESS = Path("/proc/self")

Moment = float | torch.cuda.Event


def mark(device: torch.device) -> Moment:
    """This moment in the work of a device. A GPU notes it when it gets there, so that nothing has to wait."""
    if device.type == "cuda":
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return event
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def seconds_between(start: Moment, end: Moment) -> float:
    """Seconds from one moment of a device to a later one; waits for the later."""
    if isinstance(end, torch.cuda.Event):
        end.synchronize()
        return start.elapsed_time(end) / 1000
    return end - start


@dataclass(frozen=True)
class Spread:
    """Repeated measurements of one duration in seconds."""

    median: float
    low: float
    high: float
    values: list[float]

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(statistics.median(values), min(values), max(values), list(values))


class PeakMemory:
    """The most memory in use since :meth:`start`, beyond what was in use then.

    On CUDA that of tensors. On a CPU under Linux that of the process; what it frees and takes again is not missed,
    since freed memory is returned first. Elsewhere it is not known.

    Args:
        device: whose memory.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._before: int | None = None

    def start(self) -> None:
        self._before = None
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        elif self.device.type == "cpu":
            return_freed_memory()
            try:
                (PROCESS / "clear_refs").write_text("5")  # lowers VmHWM to the present size
                self._before = resident("VmRSS")
            except OSError:
                return

    def growth(self) -> int | None:
        """Bytes, or None where they cannot be known."""
        if self._before is None:
            return None
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self._before
        return max(resident("VmHWM") - self._before, 0)


def resident(name: str) -> int:
    """Bytes of this process: VmRSS those in memory now, VmHWM the most there have been."""
    lines = (PROCESS / "status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def return_freed_memory() -> None:
    """Have the C library give memory that the process has freed back to the system, where it can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def free() -> None:
    """Give back what is no longer in use."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
