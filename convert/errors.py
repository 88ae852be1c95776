"""The errors of this package's files and adapters."""


class AdapterError(ValueError):
    """What is wrong, where, and what to do, in one line fit to be shown to a user. It is a ValueError."""


class UnknownFormatError(AdapterError):
    """A source that may hold an adapter, but not one that this package reads (LoHa, DoRA, another model's)."""


def first_line(error: BaseException) -> str:
    """What an error says, in one line: the first of its message, or its type's name where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
