"""Translates the presets of `lora-adapters init` into values of the page's fields, and options without a field."""

from collections.abc import Iterator, Mapping
from typing import Any

from lora_adapters.convert.errors import OneLineError
from lora_adapters.train.preparing.presets import Choice, Preset, named, presets
from lora_adapters.train.studio.paths import StudioError

# Training or dataset option -> field of the page.
_FIELDS = {
    "network_dim": "rank",
    "network_alpha": "alpha",
    "learning_rate": "learning_rate",
    "max_train_steps": "steps",
    "mixed_precision": "precision",
    "gradient_checkpointing": "checkpointing",
    "cache_latents": "cache_latents",
    "save_every_n_steps": "save_every",
    "resolution": "resolution",
    "batch_size": "batch",
}
_TYPES = {"networks.lora": "LoRA", "networks.dylora": "DyLoRA"}
_PER_IMAGE = ("steps", "save_every")  # presets count images, the page steps


def choices() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(title, name) of the presets for machines, and of those for purposes."""
    machines = [(preset.title, preset.name) for preset in presets().values() if preset.family is not None]
    purposes = [(preset.title, preset.name) for preset in presets().values() if preset.purpose is not None]
    return machines, purposes


def values(machine: str, purpose: str) -> dict[str, Any]:
    """Field -> value for the fields that the presets set."""
    fields: dict[str, Any] = {}
    for name, choice in _choices(machine, purpose):
        if name == "network_module":
            fields["type"] = _TYPES[choice.value]
        elif name == "network_args":
            fields |= {key: int(value) for key, value in (text.split("=") for text in choice.value)}
        elif name in _FIELDS:
            fields[_FIELDS[name]] = choice.value
    for field in _PER_IMAGE:
        if field in fields:
            fields[field] = max(1, fields[field] // fields.get("batch", 1))
    return fields


def words(machine: str, purpose: str) -> list[str]:
    """Command-line options for the presets' options without a field on the page."""
    options = {}
    for name, choice in _choices(machine, purpose):
        if name not in _FIELDS and name not in ("network_module", "network_args"):
            options[name] = f"--{name}" if choice.value is True else f"--{name}={choice.value}"
    return list(options.values())


def reasons(machine: str, purpose: str) -> list[tuple[str, str, str, str]]:
    """(option, value, reason, source) of all options of the presets."""
    return [(name, str(choice.value), choice.why, choice.source) for name, choice in _choices(machine, purpose)]


def _choices(machine: str, purpose: str) -> Iterator[tuple[str, Choice]]:
    """The choices of both presets, the machine's first; an empty name means no preset."""
    for name in filter(None, (machine, purpose)):
        try:
            preset: Preset = named(name)
        except OneLineError:
            raise StudioError(f"{name!r:.60} is not a preset") from None
        tables: tuple[Mapping[str, Choice], ...] = (preset.dataset, preset.options)
        for table in tables:
            yield from table.items()
