"""Texts of others as plain values: whatever is wrong with one is a ValueError of one line."""

import json
import sys
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_TOO_DEEP = "it is nested too deeply"


def json_value(text: str) -> Any:
    """What a JSON text holds. ValueError where it is none, or is too deep or has too long numbers for Python."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None


def toml_table(text: str) -> dict[str, Any]:
    """The table of a TOML text. ValueError where it is none, or is too deep or has too long numbers for Python."""
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
