"""The one error that everything about pictures, captions and their configuration raises."""


class DataError(ValueError):
    """One line that says what is wrong, in which file, option or picture, and what to do."""
