"""The training program's options: from the command line, a toml file, or Python."""

import argparse
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_adapters.convert.parsing import read_text, toml_table
from lora_adapters.train import options_data, options_model, options_output, options_training
from lora_adapters.train.errors import TrainingError
from lora_adapters.train.option_groups import Parser

log = logging.getLogger(__name__)

# What kohya's GUI writes into its toml besides the trainer's options. Their effect is in other options there already;
# LoRA+'s ratios it writes as options, which the trainer knows as network_args.
_OF_THE_GUI = ("epoch", "noise_offset_type")
_NETWORK_ARGS = ("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio")

GROUPS = {
    "base model": options_model.add_model,
    "machine": options_model.add_machine,
    "network": options_model.add_network,
    "steps": options_training.add_steps,
    "optimizer and schedule": options_training.add_optimizer,
    "loss and noise": options_training.add_loss,
    "data": options_data.add_dataset,
    "captions": options_data.add_captions,
    "pictures and caches": options_data.add_pictures,
    "saving and resuming": options_output.add_saving,
    "sample pictures": options_output.add_samples,
    "logging and configuration": options_output.add_logging,
}


def parser() -> argparse.ArgumentParser:
    """All options with their defaults."""
    made = Parser(prog="train_network.py", description="Train a LoRA or DyLoRA adapter.")
    for title, add in GROUPS.items():
        add(made.add_argument_group(title))
    return made


def settings(**options: Any) -> argparse.Namespace:
    """The defaults with `options` put in: what `train` takes when it is called from Python.

    Names and meanings are those of the command line, values are Python's (`network_args` may be a dict). Raises
    TrainingError for a name that is not an option, or a value that is not among its choices.
    """
    made = parser()
    chosen = made.parse_args([])
    known = {action.dest: action for action in made._actions if action.dest != "help"}
    for name, value in options.items():
        setattr(chosen, name, _checked(known, name, value, "settings"))
    return chosen


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Options from `argv`, then from its --config_file, then the defaults.

    With --output_config the options are written to --config_file and the program ends.
    """
    made = parser()
    first = made.parse_args(argv)
    if first.output_config:
        write_config(first, made)
        raise SystemExit(0)
    if not first.config_file:
        return first
    known = {action.dest: action for action in made._actions if action.dest != "help"}
    file = config_path(first.config_file)
    given = _without_the_guis(read_config(file), file)
    made.set_defaults(**{name: _checked(known, name, value, file) for name, value in given.items()})
    return made.parse_args(argv)


def config_path(name: str) -> Path:
    """The file of --config_file, with .toml added where it was left out."""
    return Path(name if name.endswith(".toml") else f"{name}.toml")


def read_config(file: Path) -> dict[str, Any]:
    """Options of a toml file. Sections are only headings: `[any] seed = 1` is the same as `seed = 1`."""
    try:
        content = toml_table(read_text(file))
    except FileNotFoundError:
        raise TrainingError(f"--config_file {file} does not exist") from None
    except OSError as error:
        raise TrainingError(f"--config_file {file} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise TrainingError(f"--config_file {file} is not toml: {error}") from None
    flat: dict[str, Any] = {}
    for name, value in content.items():
        inner = value if isinstance(value, dict) and name != "network_args" else {name: value}
        for key in inner.keys() & flat.keys():
            raise TrainingError(f"--config_file {file} gives {key} twice")
        flat.update(inner)
    return flat


def _without_the_guis(options: dict[str, Any], file: Path) -> dict[str, Any]:
    """The options of a toml file that kohya's GUI may have written, as the trainer's own."""
    for name in _OF_THE_GUI:
        if name in options:
            log.warning("%s: %s is the GUI's own and no option of training", file, name)
    kept = {name: value for name, value in options.items() if name not in (*_OF_THE_GUI, *_NETWORK_ARGS)}
    args = key_values(kept.get("network_args"), "network_args")
    moved = {name: str(options[name]) for name in _NETWORK_ARGS if name in options and name not in args}
    return {**kept, "network_args": [f"{key}={value}" for key, value in (args | moved).items()]} if moved else kept


def write_config(options: argparse.Namespace, made: argparse.ArgumentParser) -> None:
    """Write the options that differ from the defaults to --config_file, which must not exist yet."""
    if not options.config_file:
        raise TrainingError("--output_config needs --config_file: the file to write")
    file = config_path(options.config_file)
    if file.exists():
        raise TrainingError(f"--output_config: {file} exists already; name another --config_file or delete it")
    defaults = vars(made.parse_args([]))
    own = {"config_file", "output_config"}
    lines = [
        f"{name} = {_toml(value)}"
        for name, value in vars(options).items()
        if value != defaults[name] and name not in own and value is not None
    ]
    temporary = file.with_name(f".{file.name}.partial")
    temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    os.replace(temporary, file)
    print(f"wrote {len(lines)} options to {file}")


def key_values(pairs: Sequence[str] | dict[str, Any] | None, option: str) -> dict[str, str]:
    """`["conv_dim=4", ...]` as a dictionary of text; TrainingError names the option for an item without "="."""
    if isinstance(pairs, dict):
        return {key: str(value) for key, value in pairs.items()}
    found = {}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise TrainingError(f"--{option}: {pair!r} is not of the form key=value")
        found[key] = value
    return found


def _checked(known: dict[str, argparse.Action], name: str, value: Any, source: object) -> Any:
    """`value` as the command line would have given it, for the option `name`."""
    if name not in known:
        raise TrainingError(f"{source}: there is no option {name!r}")
    action = known[name]
    if action.nargs == "*":
        if value is not None and not isinstance(value, dict):
            value = list(value) if isinstance(value, list | tuple) else [value]
            try:
                value = [action.type(v) if callable(action.type) else v for v in value]
            except (TypeError, ValueError):
                raise TrainingError(f"{source}: {name} cannot be {value!r}") from None
    elif action.nargs == 0:
        if value in (0, 1):  # kohya's GUI writes some switches so
            value = bool(value)
        if not isinstance(value, bool):
            raise TrainingError(f"{source}: {name} is true or false, not {value!r}")
    elif value is not None:
        if isinstance(value, os.PathLike):
            value = str(value)
        if isinstance(value, bool | dict):
            raise TrainingError(f"{source}: {name} cannot be {value!r}")
        if name in ("resolution", "face_crop_aug_range") and isinstance(value, list | tuple):
            value = ",".join(str(v) for v in value)
        try:
            value = action.type(str(value)) if callable(action.type) else str(value)
        except (ValueError, argparse.ArgumentTypeError):
            raise TrainingError(f"{source}: {name} cannot be {value!r}") from None
    if action.choices is not None and value is not None and value not in action.choices:
        raise TrainingError(f"{source}: {name} is one of {', '.join(map(str, action.choices))}, not {value!r}")
    return value


def _toml(value: Any) -> str:
    """A toml literal. JSON's text, numbers, truth values and lists are toml's as well."""
    return json.dumps(value, ensure_ascii=False)
