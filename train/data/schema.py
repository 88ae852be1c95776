"""Tables of a toml or json file, or of a command line, checked against the fields of a dataclass.

A field made with `option(...)` carries its limits and the tables that it may stand in; its annotation says the rest.
"""

import dataclasses
import json
import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lora_adapters.train.data_error import DataError
from lora_adapters.train.options.values import did_you_mean

PLACES = {"G": "[general]", "D": "[[datasets]]", "S": "[[datasets.subsets]]", "C": "the command line"}
TYPE_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "a string", dict: "a table"}


@dataclass(frozen=True)
class Rule:
    """What a value must be beyond its type, and where its option may stand (letters of PLACES)."""

    where: str
    at_least: float | None = None
    at_most: float | None = None
    read: Callable[[Any], Any] | None = None  # raises ValueError with "what it must be"


def option(
    default: Any,
    where: str,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    read: Callable[[Any], Any] | None = None,
) -> Any:
    """A dataclass field with a Rule."""
    return dataclasses.field(default=default, metadata={"rule": Rule(where, at_least, at_most, read)})


def rules(kind: type) -> dict[str, tuple[Any, Rule]]:
    """Name -> (type, Rule) of every field of `kind` that was made with `option`."""
    hints = typing.get_type_hints(kind)
    return {
        field.name: (hints[field.name], field.metadata["rule"])
        for field in dataclasses.fields(kind)
        if "rule" in field.metadata
    }


def check_table(
    kinds: tuple[type, ...], table: Any, place: str, path: str, source: str, unknown: list[str]
) -> dict[str, Any]:
    """The values of `table`, each of its field's type and within its limits.

    Args:
        kinds: the dataclasses whose options may stand in this table.
        table: what the file has there.
        place: where that is, one letter of PLACES.
        path: the table's name for messages.
        source: the file's name for messages.
        unknown: keys that are no options are left out and added to this list, each with the nearest name.

    Raises:
        DataError: for a key that belongs elsewhere and for a wrong value.
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
        hint, rule = known[key]
        if place not in rule.where:
            allowed = " or ".join(PLACES[letter] for letter in rule.where if letter != "C")
            raise DataError(f"{where} cannot stand in {PLACES[place]}; it belongs in {allowed}")
        values[key] = check_value(hint, rule, value, where)
    return values


def check_value(hint: Any, rule: Rule, value: Any, where: str) -> Any:
    """`value` as the type `hint` within `rule`; DataError says what `where` must be."""
    if rule.read is not None:
        try:
            return rule.read(value)
        except ValueError as error:
            raise DataError(f"{where} must be {error}, not {show(value)}") from None
    kind, choices = _plain_type(hint)
    if choices:
        if value not in choices:
            raise DataError(f"{where} must be one of {', '.join(choices)}, not {show(value)}")
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    within = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if within and kind in (int, float):
        within = (
            math.isfinite(value)
            and (rule.at_least is None or value >= rule.at_least)
            and (rule.at_most is None or value <= rule.at_most)
        )
    if not within:
        raise DataError(f"{where} must be {TYPE_NAMES[kind]}{_limits(rule)}, not {show(value)}")
    return value


def show(value: Any) -> str:
    """A value as the file spells it, cut to one short line."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _plain_type(hint: Any) -> tuple[type, tuple[str, ...]]:
    """(type, choices) of an annotation such as int, str | None, Literal["a", "b"] | None."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is typing.Literal:
        return str, typing.get_args(hint)
    return typing.get_origin(hint) or hint, ()


def _limits(rule: Rule) -> str:
    if rule.at_least is not None and rule.at_most is not None:
        return f" from {rule.at_least:g} to {rule.at_most:g}"
    if rule.at_least is not None:
        return f" of at least {rule.at_least:g}"
    return f" of at most {rule.at_most:g}" if rule.at_most is not None else ""
