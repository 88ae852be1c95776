"""Command-line parsers that are built from dataclasses of options."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from lora_adapters.convert.tools import parser as parsers
from lora_adapters.train.errors import OptionError
from lora_adapters.train.options.option import Option, groups, options_of

_METAVARS: dict[type, str] = {int: "N", float: "X", str: "TEXT"}


class Parser(parsers.Parser):
    """A parser that raises OptionError for an invalid command line.

    Options may be abbreviated to a unique prefix, as with argparse. A name that lacks only its last letter is refused,
    since it is more likely a typo than an abbreviation.
    """

    failure = OptionError

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, **options)
        self._names: list[str] = []

    def add_options(self, kind: type, defaults: bool) -> None:
        """Add all options of a dataclass, in its titled groups.

        Args:
            kind: the dataclass.
            defaults: whether parsing gives the defaults of options that are not on the command line.
        """
        known = options_of(kind)
        for title, names in groups(kind).items():
            group = self.add_argument_group(title)
            for name in names:
                option = known[name]
                refused = _is_refused(option, known)
                _add(group, option, defaults, refused)
                self._names.append(option.flag)
                if refused:
                    self.refused.append(option.flag)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """argparse's method, after abbreviations are expanded."""
        words: Sequence[str] = sys.argv[1:] if args is None else args
        return super().parse_known_args([self._in_full(word) for word in words], namespace)

    def _in_full(self, word: str) -> str:
        """Expand an abbreviated option; other words are returned unchanged."""
        name, equals, value = word.partition("=")
        if len(name) < 3 or not name.startswith("--") or name in self._names or " " in name:
            return word
        matches = [known for known in self._names if known.startswith(name)]
        if len(matches) > 1:
            self.error(f"ambiguous option: {name} could match {', '.join(matches)}")
        return f"{matches[0]}{equals}{value}" if matches and len(matches[0]) - len(name) > 1 else word


def _is_refused(option: Option, known: Mapping[str, Option]) -> bool:
    """Whether an option is refused, or needs an option that is refused."""
    return option.unsupported is not None or (option.goes_with != "" and _is_refused(known[option.goes_with], known))


def _add(group: argparse._ArgumentGroup, option: Option, defaults: bool, refused: bool) -> None:
    """Add one option to a parser's group. Refused options are hidden in --help."""
    help = f"{option.help} (default: {option.shown_default})".replace("%", "%%")
    shown: dict[str, Any] = {
        "dest": option.name,
        "help": argparse.SUPPRESS if refused else help,
        "default": option.default if defaults else argparse.SUPPRESS,
    }
    if option.is_flag:
        group.add_argument(option.flag, action="store_true", **shown)
        return
    group.add_argument(
        option.flag,
        type=option.parse or str,
        nargs=("+" if option.at_least_one else "*") if option.many else None,
        choices=option.choices,
        metavar=option.metavar or (None if option.choices else _METAVARS.get(option.kind)),
        **shown,
    )
