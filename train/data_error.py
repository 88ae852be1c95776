"""The one error that everything about images, captions and their configuration raises."""

from lora_adapters.convert.errors import OneLineError


class DataError(OneLineError):
    """One line that says what is wrong, in which file, option or image, and what to do."""
