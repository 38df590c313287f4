"""The one exception for mistakes in what the user gave us, the commonest of them, and the grammar of messages."""


class InputError(ValueError):
    """A mistake in a configuration, a file or an argument.

    Its message names the file or setting and the remedy; the command line shows it without a traceback.
    """


def check_positive(**numbers: int | None) -> None:
    """Raise InputError, with its name, for the first of the given numbers that is below 1."""
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise InputError(f"{name} must be positive, got {value}")


def counted(number: int, noun: str) -> str:
    """A number with what it counts: 1 class, 2 classes, 1,437 images."""
    plural = noun + ("es" if noun.endswith(("s", "ch")) else "s")
    return f"{number:,} {noun if number == 1 else plural}"
