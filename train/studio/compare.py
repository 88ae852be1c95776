"""The data of the tab Compare: settings of an image, grids over two settings, and their commands and Python code."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_adapters.adapter import Adapter
from lora_adapters.convert.errors import AdapterError
from lora_adapters.convert.families.registry import FAMILIES, by_name
from lora_adapters.convert.formats.metadata import title_of
from lora_adapters.convert.parsing import number
from lora_adapters.convert.tools.block_weights import parse
from lora_adapters.train.studio.jobs import command_line
from lora_adapters.train.studio.paths import Folders, StudioError

PRESETS = ("ALL", "NONE", *(name for family in FAMILIES for name in family.blocks.presets))
MOST_CELLS = 100
_OPTION = re.compile(r"(?:^|\s)--[A-Za-z]")
_WEIGHTED_WORD = re.compile(r"[(\[]")


@dataclass(frozen=True)
class Slot:
    """One adapter of an image.

    source: a path or a repository. rank: the rank of a DyLoRA; None is the full rank. blocks: block weights as a
    preset, names of blocks, or a number for each block; empty for the whole adapter.
    """

    source: str
    weight: float = 1.0
    rank: int | None = None
    blocks: str = ""

    @property
    def name(self) -> str:
        return title_of(self.source)

    @property
    def argument(self) -> str:
        """The argument for the command-line programs, without the weight."""
        return f"{self.source}:lbw={self.blocks}" if self.blocks else self.source


@dataclass(frozen=True)
class Scene:
    """All settings of an image except the model. Sizes are in pixels; None is the model's default."""

    prompt: str
    negative: str = ""
    seed: int = 0
    steps: int = 20
    scale: float = 7.0
    sampler: str = "ddim"
    width: int | None = None
    height: int | None = None
    slots: tuple[Slot, ...] = ()

    def __post_init__(self) -> None:
        for text in (self.prompt, self.negative):
            if _OPTION.search(text):
                raise StudioError(f"{text:.60}: options such as --w are not supported in prompts; use the fields")

    def words(self, model: Sequence[str]) -> list[str]:
        """The arguments of `lora-adapters generate` for this image. model: the options that select the model."""
        line = f"{self.prompt} --n {self.negative}" if self.negative else self.prompt
        words = [*model, f"--prompt={line}", f"--seed={self.seed}", f"--steps={self.steps}", f"--scale={self.scale:g}"]
        words += [f"--sampler={self.sampler}"]
        words += [f"--{flag}={side}" for flag, side in (("W", self.width), ("H", self.height)) if side]
        if not self.slots:
            return words
        words += ["--network_weights", *(slot.argument for slot in self.slots)]
        words += ["--network_mul", *(f"{slot.weight:g}" for slot in self.slots)]
        if any(slot.rank for slot in self.slots):
            words += ["--network_args", *(f"rank={slot.rank}" if slot.rank else "" for slot in self.slots)]
        return words


# --- blocks ----------------------------------------------------------------------------------------------------------


def labels(architecture: str) -> tuple[str, ...]:
    """The blocks of a family, BASE (the text encoders) first."""
    return by_name(architecture).blocks.weight_lists[0]


def block_values(text: str, architecture: str) -> list[float]:
    """The weight of each block for a preset, block names or numbers. AdapterError if they cannot be parsed."""
    if not text.strip():
        return [1.0] * len(labels(architecture))
    weights = parse(text, rest=0.0)
    if weights.architecture not in (None, architecture):
        raise StudioError(f"these block weights are for {weights.architecture}, the adapter is for {architecture}")
    return [weights.get(label, weights.rest) for label in labels(architecture)]


def block_text(values: Sequence[float]) -> str:
    """Block weights as text; empty if all are 1."""
    return "" if all(value == 1 for value in values) else ",".join(f"{value:g}" for value in values)


# --- adapters --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """An adapter's properties for its sliders. ranks: the ranks of a DyLoRA, else empty."""

    architecture: str
    ranks: tuple[int, ...] = ()


def choice_of(source: str) -> Choice:
    """The `Choice` for a file, folder or repository. AdapterError if it cannot be read."""
    adapter = Adapter.load(source)
    if adapter.dylora is None:
        return Choice(adapter.architecture)
    full = max(pair.rank for pair in adapter.pairs().values())
    unit = adapter.dylora.unit
    return Choice(adapter.architecture, (*range(unit, full, unit), full))


# --- grids -----------------------------------------------------------------------------------------------------------


def axes(slots: int) -> list[str]:
    """The names of the settings that a grid can vary, for this number of adapters."""
    of_adapters = [f"{what} of adapter {n + 1}" for n in range(slots) for what in ("weight", "rank", "blocks")]
    return ["prompt", "seed", "steps", "scale", *of_adapters]


_HINTS = {
    "prompt": "one prompt per line",
    "seed": "1, 2, 3",
    "steps": "10, 20, 40",
    "scale": "4, 7, 10",
    "weight": "0, 0.5, 1",
    "rank": "4, 8, 16",
    "blocks": "ALL; INS; MIDD; OUTD (presets, block names or numbers, separated by ;)",
}
_READ: dict[str, Callable[[str], Any]] = {
    "prompt": str, "seed": int, "steps": int, "scale": number, "weight": number, "rank": int, "blocks": str,
}  # fmt: skip


def hint(axis: str | None) -> str:
    """Example values of an axis."""
    return _HINTS.get(axis.partition(" ")[0], "") if axis else ""


@dataclass(frozen=True)
class Axis:
    """One axis of a grid: the setting that varies, and its values as text."""

    name: str
    values: tuple[str, ...]

    @classmethod
    def of(cls, name: str, text: str) -> "Axis":
        """Parse an axis from the fields of the page. StudioError if there are no values."""
        kind = name.partition(" ")[0]
        parts = re.split(r"\n" if kind == "prompt" else r"[;\n]" if kind == "blocks" else r"[,;\s]+", text)
        values = tuple(dict.fromkeys(part.strip() for part in parts if part.strip()))
        if not values:
            raise StudioError(f"{name}: give its values, such as {hint(name)}")
        return cls(name, values)

    def applied(self, scene: Scene, value: str) -> Scene:
        """The scene with this value. StudioError if the value is invalid."""
        kind, _, adapter = self.name.partition(" of adapter ")
        place = int(adapter or 0) - 1
        if place >= len(scene.slots):
            raise StudioError(f"{self.name}: only {len(scene.slots)} adapters are chosen")
        try:
            read: Any = _READ[kind](value)
            if kind == "blocks":
                parse(read, rest=0.0)
        except AdapterError as error:
            raise StudioError(f"{self.name}: {error}") from None
        except ValueError:
            raise StudioError(f"{self.name} is {value!r:.60}: give values such as {hint(self.name)}") from None
        if not adapter:
            return replace(scene, **{kind: read})
        slots = [replace(slot, **{kind: read}) if n == place else slot for n, slot in enumerate(scene.slots)]
        return replace(scene, slots=tuple(slots))

    @property
    def titles(self) -> list[str]:
        """A label for each value."""
        kind, _, adapter = self.name.partition(" of ")
        start = "" if kind == "prompt" else f"{kind} "
        return [f"{start}{value}\n{adapter}".strip() for value in self.values]


def cells(scene: Scene, across: Axis | None, down: Axis | None) -> list[list[Scene]]:
    """The scenes of a grid, row by row. StudioError for the same axis twice, or too many images."""
    if across is not None and down is not None and across.name == down.name:
        raise StudioError(f"both directions of the grid are {across.name}: choose two")
    count = len(across.values if across else [""]) * len(down.values if down else [""])
    if count > MOST_CELLS:
        raise StudioError(f"the grid would have {count} images, the limit is {MOST_CELLS}")
    rows = [down.applied(scene, value) for value in down.values] if down else [scene]
    return [[across.applied(row, value) for value in across.values] if across else [row] for row in rows]


# --- commands and code -----------------------------------------------------------------------------------------------


def command_lines(rows: Sequence[Sequence[Scene]], model: Sequence[str]) -> str:
    """A `lora-adapters generate` command for each image."""
    return "\n".join(command_line(["generate", *scene.words(model)]) for row in rows for scene in row) + "\n"


def python_code(
    rows: Sequence[Sequence[Scene]], load: str, schedulers: Mapping[str, str], imports: Sequence[str] = ()
) -> str:
    """A Python program that generates the images with diffusers.

    Args:
        rows: The scenes, by rows of the sheet.
        load: The expression that loads the pipeline; without `imports` it begins with the diffusers class.
        schedulers: Sampler -> expression for its scheduler, which begins with the class.
        imports: Import lines that `load` needs.

    Returns:
        The source code.
    """
    scenes = [scene for row in rows for scene in row]
    slots = [slot for scene in scenes for slot in scene.slots]
    of_diffusers = (*schedulers.values(), *(() if imports else (load,)))
    classes = sorted({text.partition("(")[0].partition(".")[0] for text in of_diffusers})
    ours = [name for name, used in (("Adapter", any(slot.blocks for slot in slots)),
                                    ("set_rank", any(slot.rank for slot in slots))) if used]  # fmt: skip
    lines = ["import torch", f"from diffusers import {', '.join(classes)}", "", "import lora_adapters"]
    lines += [f"from lora_adapters import {', '.join(ours)}"] if ours else []
    if "Adapter" in ours:
        lines.append("from lora_adapters.convert.tools.block_weights import parse, weighted")
    lines += imports
    lines += ["", f"pipe = {load}"]
    before = Scene("")
    for nth, scene in enumerate(scenes, start=1):
        file = "image.png" if len(scenes) == 1 else f"image-{nth:03d}.png"
        lines += ["", *_changes(before, scene, schedulers[scene.sampler]), *_call(scene, file)]
        before = scene
    return "\n".join(lines) + "\n"


def _changes(before: Scene, scene: Scene, scheduler: str) -> list[str]:
    """The lines that change the pipeline from one scene to the next."""
    names = [f"adapter_{n + 1}" for n in range(len(scene.slots))]
    lines = [f"pipe.scheduler = {scheduler}"]
    if [slot.argument for slot in before.slots] != [slot.argument for slot in scene.slots]:
        lines += ["pipe.unload_lora_weights()"] if before.slots else []
        for name, slot in zip(names, scene.slots, strict=True):
            if slot.blocks:
                lines.append(f"adapter = weighted(Adapter.load({slot.source!r}), parse({slot.blocks!r}, rest=0.0))")
                lines.append(f"adapter.to_pipeline(pipe, {name!r})")
            else:
                lines.append(f"pipe.load_lora_weights({slot.source!r}, adapter_name={name!r})")
    lines += [f"set_rank(pipe, {slot.rank}, {name!r})" for name, slot in zip(names, scene.slots, strict=True)
              if slot.rank]  # fmt: skip
    lines += [f"pipe.set_adapters({names!r}, {[slot.weight for slot in scene.slots]!r})"] if names else []
    return lines


def _call(scene: Scene, file: str) -> list[str]:
    """The lines that generate and save the image of a scene."""
    weighted_words = any(_WEIGHTED_WORD.search(text) for text in (scene.prompt, scene.negative))
    return [
        *(["# `lora-adapters generate` supports prompt weights such as (word:1.3), diffusers does not"]
          if weighted_words else []),
        "image = pipe(",
        f"    {scene.prompt!r},",
        *([f"    negative_prompt={scene.negative!r},"] if scene.negative else []),
        f"    num_inference_steps={scene.steps},",
        f"    guidance_scale={scene.scale!r},",
        *(f"    {side}={value}," for side, value in (("width", scene.width), ("height", scene.height)) if value),
        f"    generator=torch.Generator().manual_seed({scene.seed}),",
        ").images[0]",
        f"image.save({file!r})",
    ]  # fmt: skip


def merge_words(scene: Scene, folders: Folders, name: str, into_model: bool, one_file: bool) -> list[str]:
    """The command line of `lora-adapters merge` for a scene. DyLoRAs are first truncated to their ranks and saved.

    Args:
        scene: The adapters with their weights.
        folders: The folders of the studio.
        name: The name of the result.
        into_model: Merge into the base model; False merges the adapters into one.
        one_file: Write one file for a model that is a folder.

    Returns:
        The words after `lora-adapters`.

    Raises:
        StudioError: There is no adapter, or the name is taken.
    """
    if not scene.slots:
        raise StudioError("there is no adapter to merge: choose one")
    ending = "" if into_model and Path(folders.model).is_dir() and not one_file else ".safetensors"
    target = folders.new(name, ending)
    slots = [replace(slot, source=cut(slot, folders)) if slot.rank else slot for slot in scene.slots]
    words = ["merge", f"--save_to={target}"]
    words += [f"--sd_model={folders.model}"] if into_model else []
    words += ["--models", *(slot.argument for slot in slots)]
    return [*words, "--ratios", *(f"{slot.weight:g}" for slot in slots)]


def cut(slot: Slot, folders: Folders) -> str:
    """Save a DyLoRA truncated to the slot's rank in the output folder, and return its path. Else return the source."""
    adapter = Adapter.load(slot.source)
    if adapter.dylora is None or not slot.rank or slot.rank == adapter.rank:
        return slot.source
    name = f"{slot.name}-rank{slot.rank}"
    target = folders.output / f"{name}.safetensors"
    adapter.truncate(slot.rank).save(target)
    return str(target)
