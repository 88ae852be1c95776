"""Checks tables of a toml or json file, or of a command line, against the fields of a dataclass.

`option(...)` defines a field's limits and the tables that may contain it; its annotation defines the type.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

from lora_adapters.train.data_error import DataError
from lora_adapters.train.options.option import TABLES, Option, options_of
from lora_adapters.train.options.values import did_you_mean

TYPE_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "a string", dict: "a table"}


def rules(kind: type) -> dict[str, Option]:
    """Name -> Option for every field of `kind` that a table may contain."""
    return {name: option for name, option in options_of(kind).items() if option.scope}


def check_table(
    kinds: tuple[type, ...], table: Any, place: str, path: str, source: str, unknown: list[str]
) -> dict[str, Any]:
    """Check a table of a dataset file.

    Args:
        kinds: Dataclasses whose options may be in this table.
        table: The content of the table.
        place: The kind of table, one letter of TABLES.
        path: The name of the table, for messages.
        source: The name of the file, for messages.
        unknown: Keys that are not options are added to this list, each with the most similar name.

    Returns:
        Option name -> value, with the type and within the limits of its field.

    Raises:
        DataError: A value is invalid, or an option belongs in another table.
    """
    if not isinstance(table, Mapping):
        raise DataError(f"{source}: {path} must be a table, not {show(table)}")
    known = {name: entry for kind in kinds for name, entry in rules(kind).items()}
    values = {}
    for key, value in table.items():
        where = f"{source}: {path}.{key}" if path else f"{source}: {key}"
        if key not in known:
            unknown.append(f"{path}.{key}{did_you_mean(key, known)}")
            continue
        option = known[key]
        if place not in option.scope:
            allowed = " or ".join(TABLES[letter] for letter in option.scope)
            raise DataError(f"{where} is not allowed in {TABLES[place]}; it belongs in {allowed}")
        values[key] = check_value(option, value, where)
    return values


def check_value(option: Option, value: Any, where: str) -> Any:
    """Convert `value` to the option's type. DataError, which mentions `where`, if it is invalid."""
    if option.read is not None:
        try:
            return option.read(value)
        except ValueError as error:
            raise DataError(f"{where} must be {error}, not {show(value)}") from None
    if option.choices:
        if value not in option.choices:
            raise DataError(f"{where} must be one of {', '.join(option.choices)}, not {show(value)}")
        return value
    kind = option.kind
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    within = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if within and kind in (int, float):
        within = math.isfinite(value) and option.allows(value)
    if not within:
        of = " of" if option.limits.startswith("at") else ""
        limits = f"{of} {option.limits}" if option.limits else ""
        raise DataError(f"{where} must be {TYPE_NAMES[kind]}{limits}, not {show(value)}")
    return value


def show(value: Any) -> str:
    """A value in JSON, shortened to at most 60 characters, for messages."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
