"""The errors of this package's files and adapters."""


class AdapterError(ValueError):
    """What is wrong, where, and what to do, in one line fit to be shown to a user. It is a ValueError."""


class UnknownFormatError(AdapterError):
    """A source that may hold an adapter, but not one that this package reads (LoHa, DoRA, another model's)."""
