"""The error classes of this package."""


class OneLineError(ValueError):
    """An error whose message is one line (what is wrong, where, what to do), even if names in it contain newlines."""

    def __init__(self, message: object = ""):
        super().__init__(" ".join(str(message).splitlines()))


class AdapterError(OneLineError):
    """An adapter, a model or a file cannot be used as requested. The message is written for users."""


class UsageError(OneLineError):
    """A command line is invalid, independently of the contents of files: programs then exit with status 2."""


class StoppedError(KeyboardInterrupt):
    """A signal ended the program. `status` is the exit status that shells and batch systems use for the signal."""

    status: int = 130


class UnknownFormatError(AdapterError):
    """A source may contain an adapter, but of a type or for a model that this package does not support."""


class UnknownModuleError(AdapterError):
    """A module name is not in any known model."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its type if the message is empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
