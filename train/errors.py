"""Errors that the training and generation programs print as one line instead of a traceback."""

from lora_adapters.convert.errors import OneLineError, UsageError


class TrainingError(OneLineError):
    """The request cannot be carried out. The message says what is wrong, where, and what to do."""


class OptionError(TrainingError, UsageError):
    """An option is invalid, independently of the model and data. The program exits with status 2."""
