"""The errors of this package's files and adapters."""


class OneLineError(ValueError):
    """What is wrong, where, and what to do, in one line, whatever the names of files and tensors in it hold."""

    def __init__(self, message: object = ""):
        super().__init__(" ".join(str(message).splitlines()))


class AdapterError(OneLineError):
    """An adapter, a model or a file cannot be used as requested. The message is written for users."""


class UsageError(OneLineError):
    """A command line that cannot be right, whatever its files hold: programs then exit with status 2."""


class StoppedError(KeyboardInterrupt):
    """A signal ended the program. `status` is the exit status that shells and batch systems know for it."""

    status: int = 130


class UnknownFormatError(AdapterError):
    """A source that may hold an adapter, but not one that this package reads (LoHa, DoRA, another model's)."""


class UnknownModuleError(AdapterError):
    """A name that no module of the models that are known has."""


def first_line(error: BaseException) -> str:
    """What an error says, in one line: the first of its message, or its type's name where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
