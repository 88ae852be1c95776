"""The command-line parser of all programs: --help in a fixed form, and errors that suggest similar options."""

import argparse
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NoReturn

from lora_adapters.convert.errors import UsageError
from lora_adapters.convert.suggestions import closest
from lora_adapters.convert.terminal import be_quiet

_called_as: ContextVar[str | None] = ContextVar("called_as", default=None)
_CHOICE = re.compile(r"invalid choice: '(.*?)' \(choose from (.*)\)", re.DOTALL)


@contextmanager
def called_as(name: str) -> Iterator[None]:
    """Within the block, programs use `name` in their help instead of the script's name."""
    token = _called_as.set(name)
    try:
        yield
    finally:
        _called_as.reset(token)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises errors as `failure`, so that they are shown like all other errors.

    Its help consists of the usage in one line, the description, examples, the options with their defaults, and the
    names of options that are not supported.

    Args:
        prog: The script's name; see `called_as`.
        description: The description of the program.
        examples: Command lines, without the program's name.
        options: Arguments of argparse.ArgumentParser.
    """

    failure: type[UsageError] = UsageError

    def __init__(self, *, prog: str, description: str = "", examples: Sequence[str] = (), **options: Any):
        options.setdefault("formatter_class", _Formatter)
        super().__init__(prog=_called_as.get() or prog, **options)
        shown = "\n".join(f"  {self.prog} {line}" for line in examples)
        self.description = f"{description.strip()}\n\nexample:\n{shown}" if examples else description
        self.refused: list[str] = []
        self.add_argument("-q", "--quiet", action=_Quiet, help="print only warnings, errors and requested output")

    def format_help(self) -> str:
        """The help text."""
        needed = [_written(action) for action in self._actions if action.required]
        self.usage = " ".join(["%(prog)s", *(word.replace("%", "%%") for word in needed), "[options]"])
        if self.refused:
            self.epilog = f"not supported (giving one prints the reason): {', '.join(sorted(self.refused))}"
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        raise self.failure(f"{message}{self._near(message)} (--help shows the options)")

    def _near(self, message: str) -> str:
        """Suggest the nearest option or choice for an unknown one."""
        if choice := _CHOICE.search(message):
            near = closest(choice[1], re.findall(r"[^\s',]+", choice[2]), 0.6)
            return f"; did you mean {near}?" if near else ""
        _, unknown, words = message.partition("unrecognized arguments: ")
        names = [word.partition("=")[0] for word in words.split() if unknown and word.startswith("--")]
        known = [name for name in self._option_string_actions if name.startswith("--")]
        hints = [near for name in names if (near := closest(name, known))]
        return f"; did you mean {' and '.join(hints)}?" if hints else ""


def refuse(parser: Parser, flag: str, why: str) -> None:
    """Add an option whose use raises an error with a reason; --help lists it as not supported."""
    parser.add_argument(flag, action=_Refused, const=why, help=argparse.SUPPRESS)
    parser.refused.append(flag)


class _Quiet(argparse.Action):
    """The action of --quiet, which takes effect at once and is not in the parsed arguments."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, *_: Any) -> None:
        be_quiet()


class _Refused(argparse.Action):
    """An option of kohya's scripts that is not supported: using it raises an error with the reason."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        raise UsageError(f"{self.option_strings[0]} is not supported: {self.const}")


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Adds the default of every option to its help, unless the help mentions it."""

    def __init__(self, prog: str, **options: Any):
        super().__init__(prog, max_help_position=32, **options)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        says = "default" in text or action.default in (None, False, argparse.SUPPRESS)
        default = str(action.default).replace("%", "%%")
        return text if says or not action.option_strings else f"{text} (default: {default})"

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Wrap paragraphs, except those with lines that begin with a space, such as examples."""
        parts = [
            part if "\n " in part else argparse.HelpFormatter._fill_text(self, part, width, indent)
            for part in text.split("\n\n")
        ]
        return "\n\n".join(parts)


def _written(action: argparse.Action) -> str:
    """A required option or argument as text for the usage line."""
    value = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    word = f"{value} ..." if action.nargs in ("+", "*") else value
    return f"{action.option_strings[-1]} {word}" if action.option_strings else word
