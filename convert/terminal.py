"""Output of programs: messages, which --quiet suppresses, and errors, whose first word is red on a terminal."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TextIO

_quiet: ContextVar[bool] = ContextVar("quiet", default=False)


@contextmanager
def own_quiet() -> Iterator[None]:
    """A context that limits the effect of `be_quiet`."""
    token = _quiet.set(_quiet.get())
    try:
        yield
    finally:
        _quiet.reset(token)


def be_quiet() -> None:
    """Suppress messages and progress bars from now on (--quiet)."""
    _quiet.set(True)


def is_quiet() -> bool:
    """Whether only warnings, errors and requested output are printed."""
    return _quiet.get()


def say(text: object) -> None:
    """Print a message, unless --quiet is given."""
    if not is_quiet():
        print(text)


def say_error(message: str) -> None:
    """Print `error: ...` on stderr."""
    print(f"{styled('error:', 'bold red', sys.stderr)} {message}", file=sys.stderr)


def styled(text: str, style: str, stream: TextIO) -> str:
    """Text with a style of rich, if the stream is a terminal that shows it.

    rich respects NO_COLOR, TERM=dumb and the consoles of Windows.

    Args:
        text: The text.
        style: A style of rich, such as "bold red".
        stream: The stream to be written to.

    Returns:
        The text with escape sequences; unchanged for a file, or if rich is not installed.
    """
    if stream is None or not stream.isatty():
        return text
    try:
        from rich.console import Console
        from rich.text import Text
    except ImportError:  # it comes with transformers 5, not with the older ones
        return text
    console = Console(file=stream, soft_wrap=True)
    with console.capture() as captured:
        console.print(Text(text, style), end="")
    return captured.get()
