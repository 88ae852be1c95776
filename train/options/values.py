"""Values of options from a file or from Python, as the command line would have given them."""

import argparse
import os
from collections.abc import Iterable, Sequence
from typing import Any

from lora_adapters.convert.suggestions import closest
from lora_adapters.train.errors import OptionError

# Other programs' names for options and for their values.
RENAMED = {"batch_size": "train_batch_size", "lr_restart_cycles": "lr_scheduler_num_cycles", "lr": "learning_rate"}
_ALIASES = {"save_precision": {"fp32": "float", "float32": "float"}}


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` (did you mean X?)` with the known name that is nearest, or an empty string where nothing is near."""
    known = list(known)
    if RENAMED.get(name) in known:
        return f" (did you mean {RENAMED[name]}?)"
    near = closest(name, known)
    return f" (did you mean {near}?)" if near else ""


def checked(action: argparse.Action, value: Any, source: object) -> Any:
    """`value` as the command line would have given it for an option; TrainingError where it would not.

    Args:
        action: the option in the parser.
        value: a value of Python's, TOML's or JSON's.
        source: where it comes from, for the error's message.
    """
    name = action.dest
    if action.nargs == "*":
        value = _list(action, value, source)
    elif action.nargs == 0:
        if value in (0, 1):  # kohya's GUI writes some switches so
            value = bool(value)
        if not isinstance(value, bool):
            raise OptionError(f"{source}: {name} is true or false, not {value!r}")
    elif value is not None:
        value = _single(action, value, source)
    if action.choices is not None and value is not None and value not in action.choices:
        allowed = ", ".join(str(choice) for choice in action.choices if choice is not None)
        near = did_you_mean(str(value), (str(choice) for choice in action.choices))
        raise OptionError(f"{source}: {name} is one of {allowed}, not {value!r}{near}")
    return value


def _list(action: argparse.Action, value: Any, source: object) -> Any:
    if value is None or isinstance(value, dict):
        return value
    value = list(value) if isinstance(value, list | tuple) else [value]
    try:
        return [action.type(one) if callable(action.type) else one for one in value]
    except (TypeError, ValueError):
        raise OptionError(f"{source}: {action.dest} cannot be {value!r}") from None


def _single(action: argparse.Action, value: Any, source: object) -> Any:
    name = action.dest
    if isinstance(value, os.PathLike):
        value = str(value)
    if isinstance(value, bool | dict):
        raise OptionError(f"{source}: {name} cannot be {value!r}")
    if name in ("resolution", "face_crop_aug_range") and isinstance(value, list | tuple):
        value = ",".join(str(one) for one in value)
    if action.type is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    value = _ALIASES.get(name, {}).get(value, value) if isinstance(value, str) else value
    try:
        return action.type(str(value)) if callable(action.type) else str(value)
    except (ValueError, argparse.ArgumentTypeError):
        raise OptionError(f"{source}: {name} cannot be {value!r}") from None


def key_values(pairs: Sequence[str] | dict[str, Any] | None, option: str) -> dict[str, str]:
    """`["conv_dim=4", ...]` as a dictionary of text; TrainingError names the option for an item without "="."""
    if isinstance(pairs, dict):
        return {key: str(value) for key, value in pairs.items()}
    found = {}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise OptionError(f"--{option}: {pair!r} is not of the form key=value")
        found[key] = value
    return found
