"""Prompt lines with options, such as `a cat --w 512 --n bad`, for sample images and image generation."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_adapters.convert.parsing import number, read_text
from lora_adapters.train.errors import TrainingError

_OPTION = re.compile(r"(?:^|\s)--(?=[A-Za-z])")


@dataclass(frozen=True)
class LineOption:
    """An option of a prompt line: the field for its value, and how the value is read from text.

    `read` raises ValueError for an invalid value; `expected` describes valid values; `empty` allows an empty value.
    """

    field: str
    read: Callable[[str], Any] = str
    expected: str = "text"
    empty: bool = False


def whole(text: str) -> int:
    """Parse a whole number of at least 0; 28.0 is valid."""
    match = re.fullmatch(r"([0-9]+)(\.0*)?", text)
    if not match:
        raise ValueError
    return int(match[1])


WHOLE = "a whole number"


def parse_line(
    line: str,
    options: Mapping[str, LineOption],
    where: str,
    refused: Mapping[str, str] | None = None,
    leave_out: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Read a prompt line with options, such as `a cat --w 512 --n bad`.

    An option begins with a space, two dashes and a letter. Its value ends at the next option.

    Args:
        line: The prompt line.
        options: The options by their letters.
        where: The place of the line, for messages.
        refused: Unsupported options, with the reason for each.
        leave_out: Called with a message for each invalid part. As in kohya's trainer, the number at the beginning of
            the value is then used, or the part is ignored. None raises an error instead.

    Returns:
        `prompt` and the fields of the options, with their values.

    Raises:
        TrainingError: A part is invalid and `leave_out` is None; the message begins with `where`.
    """
    prompt, *rest = _OPTION.split(line.strip())
    table: dict[str, Any] = {"prompt": prompt.strip()}
    for part in rest:
        letters, _, text = part.strip().partition(" ")
        option, text = options.get(letters.lower()), text.strip()
        try:
            if refused and letters.lower() in refused:
                raise TrainingError(f"{where}: --{letters} {refused[letters.lower()]}")
            if option is None:
                raise TrainingError(f"{where}: --{letters} in {line!r} is not one of --{', --'.join(options)}")
            if option.field in table:
                if leave_out is None:
                    raise TrainingError(f"{where}: --{letters} is given twice")
                leave_out(f"{where}: --{letters} is given twice; the last is used")
            table[option.field] = _value(option, letters, text, where)
        except TrainingError as error:
            if leave_out is None:
                raise
            begun = _number_at_start(option, text) if option is not None else None
            if option is not None and begun is not None:
                table[option.field] = begun
            leave_out(f"{error}; {'ignored' if begun is None else f'read as {begun}'}")
    return table


def _value(option: LineOption, letters: str, text: str, where: str) -> Any:
    if not text:
        if option.empty:
            return ""
        raise TrainingError(f"{where}: --{letters} has no value; it takes {option.expected}")
    try:
        return option.read(text)
    except ValueError:
        raise TrainingError(f"{where}: --{letters} {text}: it takes {option.expected}") from None


def _number_at_start(option: LineOption, text: str) -> Any:
    """The number at the beginning of a text, for an option with a numeric value; None if there is none."""
    patterns: dict[Callable[[str], Any], str] = {whole: r"[0-9]+", number: r"[0-9]+\.?[0-9]*"}
    pattern = patterns.get(option.read)
    match = re.match(pattern, text) if pattern else None
    try:
        return option.read(match[0]) if match else None
    except ValueError:  # more digits than Python parses
        return None


def multiple_of_8(pixels: int, where: str) -> tuple[int, str]:
    """(side of an image rounded down to a multiple of 8, at least 8; message if that changed it, else "")."""
    rounded = max(8, pixels - pixels % 8)
    if rounded == pixels:
        return pixels, ""
    return rounded, f"{where}: {pixels} pixels: sides must be multiples of 8; {rounded} is used"


def numbered_lines(text: str, file: Path | str) -> Iterator[tuple[str, str]]:
    """Yield (line, place for messages) of each line of a prompt file that is neither blank nor a comment (#)."""
    for nth, line in enumerate(text.split("\n"), start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield line.strip(), f"{file}, line {nth}"


def read_prompt_file(file: Path, option: str) -> str:
    """Read a prompt file. TrainingError, which mentions the option, if that fails."""
    try:
        return read_text(file)
    except OSError as error:
        raise TrainingError(f"{option} {file} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise TrainingError(f"{option} {file}: {error}") from None
