"""The one error of this package's files and adapters."""


class AdapterError(ValueError):
    """What is wrong, where, and what to do, in one line fit to be shown to a user."""
