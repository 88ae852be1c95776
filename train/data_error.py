"""Errors about images, captions and their configuration."""

from lora_adapters.convert.errors import OneLineError, UsageError


class DataError(OneLineError):
    """An error about data. The message is one line: what is wrong, in which file, option or image, and what to do."""


class DataOptionError(DataError, UsageError):
    """A data option is invalid, independently of the data. The program exits with status 2."""
