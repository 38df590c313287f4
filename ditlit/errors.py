"""The one exception for mistakes in what the user gave us."""


class InputError(ValueError):
    """A mistake in a configuration, a file or an argument.

    Its message names the file or setting and the remedy; the command line shows it without a traceback.
    """
