"""Presets from the package's TOML files: options for a machine or a purpose, each with its reason and source."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from lora_adapters.convert.parsing import toml_table
from lora_adapters.train.errors import OptionError
from lora_adapters.train.options.values import did_you_mean


@dataclass(frozen=True)
class Choice:
    """A value, the reason for it, and the source of the reason."""

    value: Any
    why: str
    source: str


@dataclass(frozen=True)
class Preset:
    """Choices for `--config_file` (options) and for `[general]` and `[[datasets]]` (dataset).

    A preset for a machine has family and card (GPU memory in GB, 0 without a GPU), a preset for a purpose has purpose.
    """

    name: str
    title: str
    options: Mapping[str, Choice]
    dataset: Mapping[str, Choice]
    family: str | None = None
    card: float | None = None
    purpose: str | None = None


def presets() -> dict[str, Preset]:
    """All presets by name."""
    folder = resources.files("lora_adapters.train.presets")
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".toml")), key=lambda file: file.name)
    return {name: _read(name, file) for file in files for name in [file.name.removesuffix(".toml")]}


def named(name: str) -> Preset:
    """The preset with this name. OptionError if there is none."""
    known = presets()
    if name not in known:
        raise OptionError(f"--preset {name}: the presets are {', '.join(known)}{did_you_mean(name, known)}")
    return known[name]


def for_machine(family: str, card: float) -> Preset:
    """The preset for a family on a GPU with `card` GB. OptionError if every preset needs more memory."""
    fitting = [preset for preset in presets().values() if preset.family == family and preset.card is not None]
    if not fitting:
        raise OptionError(f"there is no preset for models of {family}: give --preset")
    small = min(preset.card for preset in fitting if preset.card)
    if 0 < card < small:
        raise OptionError(f"--card {card:g}: {family} needs {small:g} GB; 0 trains without a GPU")
    return max((preset for preset in fitting if (preset.card or 0) <= card), key=lambda preset: preset.card or 0)


def _read(name: str, file: Any) -> Preset:
    table = toml_table(file.read_text(encoding="utf-8"))
    options, dataset = (
        {key: Choice(**entry) for key, entry in table.pop(part, {}).items()} for part in ("options", "dataset")
    )
    return Preset(name, options=options, dataset=dataset, **table)
