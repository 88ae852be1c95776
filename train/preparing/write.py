"""Writes dataset.toml, config.toml and prompts.txt, with the reason and source of each value as a comment."""

from collections.abc import Mapping
from pathlib import Path

from lora_adapters.convert.storage.atomic import replacing
from lora_adapters.train.errors import TrainingError
from lora_adapters.train.options.config_file import toml_literal
from lora_adapters.train.preparing.choose import Plan
from lora_adapters.train.preparing.presets import Choice

NAMES = ("dataset.toml", "config.toml", "prompts.txt")


def write(plan: Plan, out: Path, overwrite: bool) -> list[Path]:
    """Write the three files. TrainingError, before anything is written, if one exists and `overwrite` is off."""
    files = [out / name for name in NAMES]
    there = ", ".join(str(file) for file in files if file.exists())
    if there and not overwrite:
        raise TrainingError(f"already there: {there}; give --overwrite to replace them, or another folder with --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        for file, text in zip(files, (dataset_text(plan), config_text(plan), prompts_text(plan)), strict=True):
            with replacing(file) as partial:
                partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise TrainingError(f"{out}: the files cannot be written ({error.strerror or error})") from None
    return files


def dataset_text(plan: Plan) -> str:
    """The text of dataset.toml."""
    general = {key: choice for key, choice in plan.dataset.items() if key not in ("batch_size", "validation_split")}
    own = {key: choice for key, choice in plan.dataset.items() if key not in general}
    lines = ["# What is trained on: written by lora-adapters init, for editing.", "", "[general]", *_lines(general), ""]
    lines += ["[[datasets]]", *_lines(own)]
    for subset in plan.subsets:
        lines += ["", "  [[datasets.subsets]]", *(f"  {line}" for line in _lines(subset))]
    return "\n".join(lines) + "\n"


def config_text(plan: Plan) -> str:
    """The text of config.toml."""
    used = ", ".join(f"{preset.name} ({preset.title})" for preset in plan.presets)
    lines = [
        "# How it is trained: lora-adapters train --config_file config.toml; options on the command line win.",
        f"# Presets: {_one_line(used)}.",
        "",
        *_lines(plan.options),
    ]
    return "\n".join(lines) + "\n"


def prompts_text(plan: Plan) -> str:
    """The text of prompts.txt."""
    side = plan.dataset["resolution"].value
    lines = ["# Prompts of the sample images, each followed by its options."]
    return "\n".join([*lines, *(f"{_prompt(text)} --w {side} --h {side} --s 20 --d 1" for text in plan.prompts)]) + "\n"


def _lines(choices: Mapping[str, Choice]) -> list[str]:
    values = [f"{key} = {toml_literal(item.value)}" for key, item in choices.items()]
    return [f"{value}  # {_one_line(f'{choice.why} [{choice.source}]')}"
            for value, choice in zip(values, choices.values(), strict=True)]  # fmt: skip


def _one_line(text: str) -> str:
    """Make text safe for a comment, since folder names may contain any characters."""
    return "".join(character if character.isprintable() else " " for character in text)


def _prompt(text: str) -> str:
    """A caption as a prompt, without parts that would be read as an option or a comment."""
    return _one_line(text).replace(" --", " ").lstrip("#- ") or "a photo"
