"""Texts of others as plain values: whatever is wrong with one is a ValueError of one line."""

import json
import math
import sys
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_TOO_DEEP = "it is nested too deeply"
_TOO_LONG = "it has a whole number of more than 64 bits"


def number(text: str | float) -> float:
    """A number that is neither infinite nor none (nan); ValueError for anything else."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no finite number")
    return value


def _whole(value: int) -> int:
    """The value, where it is one that TOML and most readers of JSON can have."""
    if not -(2**63) <= value < 2**64:
        raise ValueError(_TOO_LONG)
    return value


def _check(value: Any) -> None:
    """ValueError where a whole number in a TOML value is too long."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            _check(part)
    elif isinstance(value, int):
        _whole(value)


def json_value(text: str) -> Any:
    """What a JSON text holds. ValueError where it is none, or is too deep or has too long numbers for Python."""
    try:
        return json.loads(text, parse_int=lambda digits: _whole(int(digits)))
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None


def toml_table(text: str) -> dict[str, Any]:
    """The table of a TOML text. ValueError where it is none, or is too deep or has too long numbers for Python."""
    try:
        table = tomllib.loads(text)
        _check(table)
        return table
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
