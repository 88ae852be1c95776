"""Parsing untrusted text: every problem is reported as a ValueError with a message of one line."""

import codecs
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_TOO_DEEP = "it is nested too deeply"
_TOO_LONG = "it has a whole number of more than 64 bits"
_TEXT_HINT = "save the file as UTF-8"
_ESCAPE_ERROR = re.compile(r"Unescaped|hex value|Escaped character")  # in tomllib's messages
_DRIVE_WITH_ESCAPE = re.compile(r"[A-Za-z]:(?=[\b\t\n\f\r/\\]).*[\b\t\n\f\r]", re.DOTALL)
_PATH_HINT = """a backslash in "..." starts an escape; write the path in single quotes ('C:\\x') or with / ("C:/x")"""


def read_text(file: str | Path) -> str:
    r"""Read a text file of a user: captions, prompts, TOML or JSON.

    Args:
        file: UTF-8 with or without a byte order mark, or UTF-16 with one.

    Returns:
        The text with \n as line ends, also for \r\n and \r. Other separators (U+2028, U+0085, form feed) are
        ordinary characters, so split the text at \n and not with `splitlines`.

    Raises:
        OSError: The file cannot be read.
        ValueError: The encoding is wrong; the message has the position of the byte, from 0, but not the file.
    """
    return decoded(Path(file).read_bytes())


def decoded(data: bytes) -> str:
    """The bytes of a text file as text, see `read_text`."""
    if data.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        raise ValueError(f"text in UTF-32 (byte order mark at byte 0); {_TEXT_HINT}")
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    encoding = "utf-16" if wide else "utf-8"
    try:
        text = data.decode(encoding)  # not utf-8-sig, whose error positions do not include the byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"not {encoding.upper()} at byte {error.start}; {_TEXT_HINT}") from None
    text = text.removeprefix("\ufeff")
    if "\0" in text:
        at = 2 + len(text.partition("\0")[0].encode("utf-16-le")) if wide else data.index(0)
        raise ValueError(f"not text: a NUL at byte {at} (UTF-16 needs a byte order mark); {_TEXT_HINT}")
    return one_line_end(text)


def one_line_end(text: str) -> str:
    """The text with `\\n` in place of `\\r\\n` and `\\r`."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def number(text: str | float) -> float:
    """Parse a finite number; ValueError for anything else."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


def _whole(value: int) -> int:
    """The value if it fits into 64 bits, as in TOML and most JSON readers; otherwise ValueError."""
    if not -(2**63) <= value < 2**64:
        raise ValueError(_TOO_LONG)
    return value


def _check(value: Any) -> None:
    """ValueError if a whole number in a TOML value is too long."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            _check(part)
    elif isinstance(value, int):
        _whole(value)
    elif isinstance(value, str) and _DRIVE_WITH_ESCAPE.match(value):
        raise ValueError(f"{value!r} is not a path: {_PATH_HINT}")


def json_value(text: str) -> Any:
    """Parse JSON; ValueError if it is invalid, too deeply nested, or has too large integers."""
    try:
        return json.loads(text, parse_int=lambda digits: _whole(int(digits)))
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    except json.JSONDecodeError as error:
        if "\\" not in error.msg:
            raise
        raise ValueError(f"{error}; in paths write \\\\ or / for a backslash") from None


def json_table(value: object) -> dict[str, Any]:
    """A JSON object, given as a dictionary or as text; {} for anything else, which other programs may have written."""
    if isinstance(value, str):
        try:
            value = json_value(value)
        except ValueError:
            return {}
    return value if isinstance(value, dict) else {}


def toml_table(text: str) -> dict[str, Any]:
    """Parse TOML; ValueError if it is invalid, too deeply nested, or has too large integers."""
    try:
        table = tomllib.loads(text)
        _check(table)
        return table
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    except tomllib.TOMLDecodeError as error:
        hint = f": {_PATH_HINT}" if _ESCAPE_ERROR.search(str(error)) else ""
        raise ValueError(f"{error}{hint}") from None
