"""The largest batch that fits a device's memory."""

from collections.abc import Callable

from ditlit.benchmarking.gauges import free
from ditlit.errors import InputError
from ditlit.resilience.memory import ran_out

LARGEST_TRIED = 2**16


def fits(step: Callable[[int], None], n: int) -> bool:
    """Whether ``step`` of n samples finds enough memory; what it leaves is freed."""
    try:
        step(n)
        return True
    except Exception as error:
        if not ran_out(error):
            raise
        return False
    finally:
        free()


def largest_batch(step: Callable[[int], None], largest: int = LARGEST_TRIED) -> int:
    """The largest n, up to ``largest``, of which ``step(n)`` finds enough memory: by doubling, then halving the gap.

    Raises:
        InputError: where not even one sample fits.
    """
    good, bad = 0, 1
    while bad <= largest and fits(step, bad):
        good, bad = bad, 2 * bad
    if good == 0:
        raise InputError("not even a batch of one sample fits this device's memory: choose a smaller model, or set "
                         "--model.denoiser.gradient_checkpointing true")  # fmt: skip
    bad = min(bad, largest + 1)
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(step, middle) else (good, middle)
    return good


def accumulation(global_batch_size: int, gpus: int, largest: int) -> int | None:
    """The fewest accumulated batches by which a global batch fits, or None where none divides it so."""
    share = global_batch_size // gpus
    fitting = (a for a in range(1, share + 1) if share % a == 0 and share // a <= largest)
    return next(fitting, None) if global_batch_size % gpus == 0 else None
