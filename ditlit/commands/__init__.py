"""Commands that are functions: their keywords are the settings, their docstrings the ``--help``."""
