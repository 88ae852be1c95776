"""The presets: options for a machine and a purpose, each with its reason and source, from the package's TOML files."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from lora_adapters.convert.parsing import toml_table
from lora_adapters.train.errors import OptionError
from lora_adapters.train.options.values import did_you_mean


@dataclass(frozen=True)
class Choice:
    """A value, why it is that one, and where this is from."""

    value: Any
    why: str
    source: str


@dataclass(frozen=True)
class Preset:
    """Choices for `--config_file` (options) and for `[general]` and `[[datasets]]` (dataset).

    family and card (GB, 0: none) are what a preset of a machine is for, purpose what one of a purpose is for.
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
    """The preset of a name. OptionError if there is none."""
    known = presets()
    if name not in known:
        raise OptionError(f"--preset {name}: the presets are {', '.join(known)}{did_you_mean(name, known)}")
    return known[name]


def for_machine(family: str, card: float) -> Preset:
    """The preset for models of a family on a card of so many GB. OptionError if none is for so small a card."""
    fitting = [preset for preset in presets().values() if preset.family == family and preset.card is not None]
    if not fitting:
        raise OptionError(f"there is no preset for models of {family}: name others with --preset")
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
