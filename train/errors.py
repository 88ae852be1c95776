"""The one error that the training program answers with one line instead of a traceback."""

from lora_adapters.convert.errors import OneLineError


class TrainingError(OneLineError):
    """What the user asked for cannot be done. The message says what, where, and what to do."""
