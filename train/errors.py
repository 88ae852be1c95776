"""The errors that the programs of this folder print as one line instead of a traceback."""

from lora_adapters.convert.errors import OneLineError, UsageError


class TrainingError(OneLineError):
    """What the user asked for cannot be done. The message says what, where, and what to do."""


class OptionError(TrainingError, UsageError):
    """An option that cannot be right, whatever model and data hold. The program exits with status 2."""
