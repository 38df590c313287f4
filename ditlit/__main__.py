"""``python -m ditlit`` and the ``ditlit`` script: a table of commands."""

import errno
import os
import sys
from difflib import get_close_matches

from ditlit import __version__
from ditlit.commands import COMMANDS, call, settings_of
from ditlit.errors import InputError
from ditlit.quiet import quieten
from ditlit.run_help import DESCRIPTIONS, kept_help
from ditlit.settings.configs import with_found_configs
from ditlit.settings.flags import add_arguments

USAGE = f"""ditlit {__version__}: train, sample and understand Diffusion Transformers

usage: ditlit COMMAND [--config FILE] [--KEY VALUE ...]

commands:
  encode    turn a folder of images into a latent store
  fit       train a DiT on a latent store
  validate  compute the loss on held-out latents
  test      the same on test latents
  predict   draw samples as PNG files
  sample    draw images from any checkpoint, in any way
  evaluate  FID and its relatives, with a record of how each number was made
            evaluate sweep   over guidance scales, steps and samplers
            evaluate loss    by timestep: is it normal?
            evaluate scaling quality against compute, from several runs
  benchmark speed, memory and use of the device of a configuration; what a run will take
  convert   bring weights from and to other formats

Start with     ditlit fit --config digits.yaml      (two cores, a few minutes)
See a recipe   ditlit fit --config xl2.yaml --print_config
All settings   ditlit fit --help
"""

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
KEPT = "run the command again to go on: what is written is kept"


def main() -> None:
    """Run one command; mistakes in the input end with one line and exit status 2."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help", "help"):
        print(USAGE)
        return
    if sys.argv[1] == "--version":
        print(__version__)
        return
    let_idle_threads_sleep()
    for stream in (sys.stdout, sys.stderr):  # a name that the console cannot show is no reason to lose what was done
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    quieten()
    command = next((name for name in (" ".join(sys.argv[1:3]), sys.argv[1]) if name in COMMANDS), None)
    try:
        if command is not None:
            from ditlit.parser import parsed

            settings = parsed(command_parser(command), joined(sys.argv[1 + len(command.split()) :]))
            settings.pop("config")
            call(command, **settings.as_dict())
        elif sys.argv[1] in DESCRIPTIONS or sys.argv[1].startswith("-"):
            run(sys.argv[1:])
        else:
            near = get_close_matches(sys.argv[1], (*DESCRIPTIONS, *COMMANDS), 1)
            meant = f"; did you mean {near[0]}?" if near else "."
            raise InputError(f"there is no command {sys.argv[1]!r}{meant} All are shown by ditlit --help")
    except InputError as error:
        print(f"\nditlit: error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if command is None or error.errno not in DISK_FULL:
            raise
        print(f"\nditlit: error: {error.strerror}. Free some space and {KEPT}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        workers = sys.modules.get("ditlit.data.workers")
        reason = workers and workers.lost_worker(error)
        if reason is None:
            raise
        print(f"\nditlit: error: {reason}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nditlit: stopped by Ctrl-C" + (f"; {KEPT}" if command else ""), file=sys.stderr)
        sys.exit(130)  # as a shell reports a command that a signal has ended
    except SystemExit:  # all ranks stop: a signal, or a run that diverged
        leave_ranks()
        raise
    leave_ranks()


def run(words: list[str]) -> None:
    """One of Lightning's commands or the benchmark; what can be told without torch is told before it is imported."""
    if words[0] in DESCRIPTIONS and words[1:] in (["--help"], ["-h"]) and (text := kept_help(words[0])) is not None:
        print(text)
        raise SystemExit
    with_found_configs(words)
    if words[0] == "benchmark":
        from ditlit.benchmarking.cli import BenchmarkCLI

        BenchmarkCLI(words[1:]).benchmark()
    else:
        from ditlit.cli import DitlitCLI

        DitlitCLI()


def let_idle_threads_sleep() -> None:
    """Let OpenMP's threads sleep while they wait for each other, unless the user has chosen how they wait.

    By default they spin, and where other programs want the same cores, a thread that spins keeps the one that it waits
    for from running. OpenMP reads this when torch is loaded.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys():
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def leave_ranks() -> None:
    """End the communication with the other ranks, of a command that all of them have come to the end of.

    A thread of gloo may still hold a tensor of its last message. It would abort the process, and with it a finished
    job, if it let go of it while Python ends.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def joined(words: list[str]) -> list[str]:
    """Words with the two files of ``--compare A.json B.json`` as the one value that its setting takes."""
    if "--compare" in words[:-2] and not words[words.index("--compare") + 2].startswith("--"):
        first = words.index("--compare") + 1
        words = [*words[:first], ",".join(words[first : first + 2]), *words[first + 2 :]]
    return words


def command_parser(command: str):
    """The parser of a command with settings of its own: a dataclass, explained by its docstring."""
    from ditlit.parser import Parser

    settings = settings_of(command)
    parser = Parser(prog=f"ditlit {command}", description=settings.__doc__.split("\n\n    Args:")[0])
    parser.add_argument("--config", action="config", help="YAML file of these settings")
    add_arguments(parser, settings)
    return parser


if __name__ == "__main__":
    main()
