"""What a small model loses on a machine that others use too: training steps with waiting threads that spin or sleep.

    python tests/benchmarks/shared_machine.py [--busy 0 2] [--rounds 3] [--steps 40]

Trains the digits recipe in a new process for each way of waiting, in turn, alone and beside so many busy processes.
``sleep`` is ditlit's own choice (OMP_WAIT_POLICY=PASSIVE), ``spin`` is what OpenMP does by itself, ``one`` is a single
thread. Each line also says how much processor time went to anything else on the machine (Linux only): a measurement
with more than a second or two of that is not one.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

# 300,000 turns is what libgomp spins where nothing is said.
WAITING = {"sleep": {}, "spin": {"GOMP_SPINCOUNT": "300000"}, "one": {"OMP_NUM_THREADS": "1"}}
USAGE = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
WARMUP = 5  # steps that are not counted
CHILD = "--child"


def train(steps: int, folder: str) -> None:
    """Train in this process and print the seconds of each step after the first few."""
    from ditlit.__main__ import let_idle_threads_sleep

    let_idle_threads_sleep()
    from lightning.pytorch import Callback

    from ditlit.cli import DitlitCLI

    class Clock(Callback):
        def __init__(self):
            self.ends: list[float] = []

        def on_train_batch_end(self, *args):
            self.ends.append(time.perf_counter())

    clock = Clock()

    class CLI(DitlitCLI):
        def instantiate_trainer(self, **kwargs):
            trainer = super().instantiate_trainer(**kwargs)
            trainer.callbacks = [clock]
            return trainer

    CLI(["fit", "--config", "digits.yaml", "--trainer.max_steps", str(steps), "--trainer.default_root_dir", folder])
    ends = clock.ends[WARMUP:]
    print("\n" + json.dumps((ends[-1] - ends[0]) / (len(ends) - 1)))


def others_time() -> float:
    """Seconds of processor time of this machine that this process and its ended children have not used (Linux only)."""
    user, nice, system = map(int, Path("/proc/stat").read_text().split()[1:4])
    own = sum(getattr(resource.getrusage(who), kind) for who in USAGE for kind in ("ru_utime", "ru_stime"))
    return (user + nice + system) / os.sysconf("SC_CLK_TCK") - own


def measure(waiting: str, busy: int, steps: int) -> tuple[float, float]:
    """Seconds a step, and the processor time that programs other than these took meanwhile."""
    before = others_time()
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
    try:
        with tempfile.TemporaryDirectory() as folder:
            words = [sys.executable, __file__, CHILD, str(steps), f"{folder}/run"]
            result = subprocess.run(words, env=os.environ | WAITING[waiting], stdout=subprocess.PIPE, check=True)
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()
    return json.loads(result.stdout.splitlines()[-1]), others_time() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 2], help="busy processes beside the training")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    for busy in args.busy:
        seconds = defaultdict(list)
        for _ in range(args.rounds):
            for waiting in WAITING:
                step, elsewhere = measure(waiting, busy, args.steps)
                seconds[waiting].append(step)
                print(f"beside {busy}: {waiting:5s} {step:6.3f} s a step; {elsewhere:.1f} s of others", flush=True)
        for waiting, steps in seconds.items():
            ratio = statistics.median(a / b for a, b in zip(steps, seconds["sleep"], strict=True))
            print(f"beside {busy}: {waiting:5s} median {statistics.median(steps):.3f} s, {ratio:.2f} x sleep")


if __name__ == "__main__":
    if sys.argv[1:2] == [CHILD]:
        train(int(sys.argv[2]), sys.argv[3])
    else:
        main()
