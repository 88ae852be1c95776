"""Checks and converts option values from a file or from Python as the command line does."""

import argparse
import os
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from lora_adapters.convert.suggestions import closest
from lora_adapters.train.errors import OptionError
from lora_adapters.train.options.option import Option

T = TypeVar("T")
# Other programs' names for options and for their values.
RENAMED = {"batch_size": "train_batch_size", "lr_restart_cycles": "lr_scheduler_num_cycles", "lr": "learning_rate"}
_ALIASES = {"save_precision": {"fp32": "float", "float32": "float"}}


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` (did you mean X?)` with the most similar known name, or an empty string if none is similar."""
    known = list(known)
    if RENAMED.get(name) in known:
        return f" (did you mean {RENAMED[name]}?)"
    near = closest(name, known)
    return f" (did you mean {near}?)" if near else ""


def checked(option: Option, value: Any, source: object) -> Any:
    """Check and convert a value that is not from the command line.

    Args:
        option: The option.
        value: A value of Python, TOML or JSON.
        source: Where it comes from, for messages.

    Returns:
        The value, with the type that the command line would give.

    Raises:
        OptionError: The command line would not accept it.
    """
    name = option.name
    if option.many:
        value = _list(option, value, source)
    elif option.is_flag:
        if value in (0, 1):  # kohya's GUI writes some switches as numbers
            value = bool(value)
        if not isinstance(value, bool):
            raise OptionError(f"{source}: {name} is true or false, not {value!r}")
    elif value is not None:
        value = _single(option, value, source)
    if option.choices is not None and value is not None and value not in option.choices:
        allowed = ", ".join(str(choice) for choice in option.choices)
        near = did_you_mean(str(value), (str(choice) for choice in option.choices))
        raise OptionError(f"{source}: {name} is one of {allowed}, not {value!r}{near}")
    return value


def _list(option: Option, value: Any, source: object) -> Any:
    if value is None or isinstance(value, dict):
        return value
    value = list(value) if isinstance(value, list | tuple) else [value]
    try:
        return [item if option.kind is str or option.parse is None else option.parse(item) for item in value]
    except (TypeError, ValueError):
        raise OptionError(f"{source}: {option.name} cannot be {value!r}") from None


def _single(option: Option, value: Any, source: object) -> Any:
    name = option.name
    if isinstance(value, os.PathLike):
        value = str(value)
    if isinstance(value, bool | dict):
        raise OptionError(f"{source}: {name} cannot be {value!r}")
    if name in ("resolution", "face_crop_aug_range") and isinstance(value, list | tuple):
        value = ",".join(str(side) for side in value)
    if option.kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    value = _ALIASES.get(name, {}).get(value, value) if isinstance(value, str) else value
    try:
        return str(value) if option.parse is None else option.parse(str(value))
    except (ValueError, argparse.ArgumentTypeError):
        raise OptionError(f"{source}: {name} cannot be {value!r}") from None


def required(value: T | None, flag: str) -> T:
    """Return `value`. OptionError if it is None."""
    if value is None:
        raise OptionError(f"{flag} is missing")
    return value


def key_values(pairs: Sequence[str] | dict[str, Any] | None, option: str) -> dict[str, str]:
    """Parse `["conv_dim=4", ...]` into a dictionary of strings. OptionError if an item has no "="."""
    if isinstance(pairs, dict):
        return {key: str(value) for key, value in pairs.items()}
    values = {}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise OptionError(f"--{option}: {pair!r} is not of the form key=value")
        values[key] = value
    return values
