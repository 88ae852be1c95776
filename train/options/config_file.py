"""The training program's --config_file: a toml file of options."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lora_adapters.convert.parsing import read_text, toml_table
from lora_adapters.convert.storage.atomic import replacing
from lora_adapters.convert.terminal import say
from lora_adapters.train.errors import OptionError, TrainingError
from lora_adapters.train.options.option import Option, options_of
from lora_adapters.train.options.settings import Settings
from lora_adapters.train.options.values import checked, did_you_mean, key_values

log = logging.getLogger(__name__)

# Keys that kohya's GUI writes in addition to the trainer's options; other options there already have their effect.
# It writes LoRA+'s ratios as options, but the trainer reads them from network_args.
_OF_THE_GUI = ("epoch", "noise_offset_type")
_NETWORK_ARGS = ("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio")
_NOT_WRITTEN = ("config_file", "output_config")


def config_path(name: str) -> Path:
    """The path of --config_file, with .toml added if it is missing."""
    return Path(name if name.endswith(".toml") else f"{name}.toml")


def file_options(name: str, line: Mapping[str, Any]) -> dict[str, Any]:
    """Read the options of a --config_file.

    Unknown names, and invalid values of options that this run does not use, are ignored with a warning. An empty
    string, and false for an option that takes a value, mean "not given".

    Args:
        name: The value of --config_file.
        line: The options on the command line.

    Returns:
        Option name -> value, with the types of the command line.

    Raises:
        TrainingError: The file cannot be read, or a value is invalid.
    """
    file, known = config_path(name), options_of(Settings)
    options = _without_the_guis(read_config(file), file)
    unknown = [f"{name}{did_you_mean(name, known)}" for name in options if name not in known]
    if unknown:
        log.warning("%s: not options of this trainer, and ignored: %s", file, ", ".join(unknown))
    own = {name: value for name, value in options.items() if name in known and not _not_given(known[name], value)}
    together = SimpleNamespace(**{**{name: option.default for name, option in known.items()}, **own, **line})
    values = {}
    for name, value in own.items():
        unread = known[name].unread
        try:
            values[name] = checked(known[name], value, file)
        except TrainingError as error:
            if unread is None or not unread(together):
                raise
            log.warning("%s; it is not used in this run, and ignored", error)
    return values


def _not_given(option: Option, value: Any) -> bool:
    return value == "" or (value is False and not option.is_flag)


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
            if inner[key] != flat[key]:
                log.warning("%s gives %s twice: %r is used, not %r", file, key, inner[key], flat[key])
        flat.update(inner)
    return flat


def _without_the_guis(options: dict[str, Any], file: Path) -> dict[str, Any]:
    """Translate options of a toml file that kohya's GUI may have written into the trainer's options."""
    for name in _OF_THE_GUI:
        if name in options:
            log.warning("%s: %s is the GUI's own and no option of training", file, name)
    kept = {name: value for name, value in options.items() if name not in (*_OF_THE_GUI, *_NETWORK_ARGS)}
    args = key_values(kept.get("network_args") or None, "network_args")
    moved = {name: str(options[name]) for name in _NETWORK_ARGS if name in options and name not in args}
    return {**kept, "network_args": [f"{key}={value}" for key, value in (args | moved).items()]} if moved else kept


def write_config(settings: Settings) -> None:
    """Write the options that were given to --config_file, which must not exist yet. No keys or tokens."""
    if not settings.config_file:
        raise OptionError("--output_config needs --config_file: the file to write")
    file = config_path(settings.config_file)
    if file.exists():
        raise TrainingError(f"--output_config: {file} exists already; name another --config_file or delete it")
    known = options_of(Settings)
    lines = [
        f"{name} = {toml_literal(value)}"
        for name, value in settings.given_options().items()
        if name not in _NOT_WRITTEN and not known[name].secret
    ]
    with replacing(file) as partial:
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    say(f"wrote {len(lines)} options to {file}")


def toml_literal(value: Any) -> str:
    """A toml literal. Strings, numbers, booleans and lists are the same in JSON and toml."""
    return json.dumps(value, ensure_ascii=False)
