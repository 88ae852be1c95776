"""The errors that everything about images, captions and their configuration raises."""

from lora_adapters.convert.errors import OneLineError, UsageError


class DataError(OneLineError):
    """One line that says what is wrong, in which file, option or image, and what to do."""


class DataOptionError(DataError, UsageError):
    """An option about data that cannot be right, whatever the data are. The program exits with status 2."""
