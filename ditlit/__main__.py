"""``python -m ditlit`` and the ``ditlit`` script: a table of commands."""

import sys

from ditlit import __version__
from ditlit.errors import InputError

USAGE = f"""ditlit {__version__}: train, sample and understand Diffusion Transformers

usage: ditlit COMMAND [--config FILE] [--KEY VALUE ...]

commands:
  fit       train a DiT on a latent store
  validate  compute the loss on held-out latents
  test      the same on test latents
  predict   draw samples as PNG files

Start with     ditlit fit --config digits.yaml      (two cores, a few minutes)
See a recipe   ditlit fit --config xl2.yaml --print_config
All settings   ditlit fit --help
"""


def main() -> None:
    """Run one command; mistakes in the input end with one line and exit status 2."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help", "help"):
        print(USAGE)
        return
    if sys.argv[1] == "--version":
        print(__version__)
        return
    from ditlit.cli import DitlitCLI  # after the cheap answers: it imports torch

    try:
        DitlitCLI()
    except InputError as error:
        print(f"\nditlit: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
