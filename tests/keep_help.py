"""Keep the help of fit, validate, test, predict and benchmark in a file, so that showing it loads no torch.

python tests/keep_help.py
"""

import json
from contextlib import suppress
from typing import Any

from ditlit.benchmarking.cli import BenchmarkCLI
from ditlit.cli import DitlitCLI
from ditlit.run_help import KEPT, made_from


def collected() -> dict[str, Any]:
    """What is kept, from the parsers."""
    shown = {command: parser.brief() for cli in (DitlitCLI, BenchmarkCLI) for command, parser in parsers(cli).items()}
    settings = list(dict.fromkeys(setting for found in shown.values() for setting in found))
    places = {setting: place for place, setting in enumerate(settings)}
    commands = {command: [places[setting] for setting in found] for command, found in shown.items()}
    return {"made from": made_from(), "commands": commands, "settings": settings}


def parsers(cli: type) -> dict[str, Any]:
    """The parsers of a command line by their commands."""
    found = {}

    class Collected(Exception):
        pass

    class Collecting(cli):
        def parse_arguments(self, parser: Any, args: Any) -> None:
            found.update(getattr(self, "_subcommand_parsers", None) or {"benchmark": parser})
            raise Collected

    with suppress(Collected):
        Collecting([])
    return found


def as_text(kept: dict[str, Any]) -> str:
    """JSON with a line for each command and each setting."""
    commands = ",\n  ".join(
        f"{json.dumps(command)}: {json.dumps(found)}" for command, found in kept["commands"].items()
    )
    settings = ",\n  ".join(json.dumps(setting) for setting in kept["settings"])
    made = json.dumps(kept["made from"])
    return f'{{"made from": {made},\n "commands": {{\n  {commands}}},\n "settings": [\n  {settings}]}}\n'


if __name__ == "__main__":
    KEPT.write_text(as_text(collected()))
