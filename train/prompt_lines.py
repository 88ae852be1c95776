"""Prompts with options behind them, `a cat --w 512 --n bad`: the syntax that samples and pictures share."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_adapters.convert.parsing import read_text
from lora_adapters.train.errors import TrainingError

_OPTION = re.compile(r"(?:^|\s)--(?=[A-Za-z])")


@dataclass(frozen=True)
class LineOption:
    """What an option's letters mean: the field that its value goes to, and how the value is read from text.

    `read` raises ValueError for a value that it does not take; `wanted` says what it does.
    """

    field: str
    read: Callable[[str], Any] = str
    wanted: str = "text"


def whole(text: str) -> int:
    """A whole number of 0 or more."""
    if not re.fullmatch(r"[0-9]+", text):
        raise ValueError
    return int(text)


WHOLE = "a whole number"


def parse_line(
    line: str, options: Mapping[str, LineOption], where: str, refused: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """`a cat --w 512 --n bad` as a table with `prompt` and the fields of its options.

    An option is two dashes after a space and before a letter; its value runs to the next one. `refused` has the reasons
    for which other options are not supported. TrainingError, which begins with `where`, for anything else.
    """
    prompt, *rest = _OPTION.split(line.strip())
    table: dict[str, Any] = {"prompt": prompt.strip()}
    for part in rest:
        letters, _, text = part.strip().partition(" ")
        name, text = letters.lower(), text.strip()
        if refused and name in refused:
            raise TrainingError(f"{where}: --{letters} {refused[name]}")
        if name not in options:
            raise TrainingError(f"{where}: --{letters} in {line!r} is none of --{', --'.join(options)}")
        option = options[name]
        if option.field in table:
            raise TrainingError(f"{where}: --{letters} stands twice")
        if not text:
            raise TrainingError(f"{where}: --{letters} has no value; it takes {option.wanted}")
        try:
            table[option.field] = option.read(text)
        except ValueError:
            raise TrainingError(f"{where}: --{letters} {text}: it takes {option.wanted}") from None
    return table


def numbered_lines(text: str, file: Path | str) -> Iterator[tuple[str, str]]:
    """(line, where) of each line of a prompt file that is neither blank nor a comment (#)."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield line.strip(), f"{file}, line {number}"


def read_prompt_file(file: Path, option: str) -> str:
    """The text of a prompt file. TrainingError, which names the option, where it cannot be read."""
    try:
        return read_text(file)
    except OSError as error:
        raise TrainingError(f"{option} {file} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise TrainingError(f"{option} {file}: {error}") from None
