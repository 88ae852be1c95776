"""The one error that the training program answers with one line instead of a traceback."""


class TrainingError(ValueError):
    """What the user asked for cannot be done. The message says what, where, and what to do."""
