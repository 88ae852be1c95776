"""Sample images during training: one grid with a column for each prompt and a row for each DyLoRA rank."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import make_image_grid
from PIL import Image

from lora_adapters.convert.parsing import json_value, number, toml_table
from lora_adapters.convert.storage.files import replacing
from lora_adapters.train.errors import TrainingError
from lora_adapters.train.generation.image_grid import draw_sheet
from lora_adapters.train.generation.prompt_lines import (
    WHOLE,
    LineOption,
    multiple_of_8,
    numbered_lines,
    parse_line,
    read_prompt_file,
    whole,
)
from lora_adapters.train.models.base import BaseModels
from lora_adapters.train.models.schedulers import check_sampler
from lora_adapters.train.models.text_encoding import Encoded
from lora_adapters.train.options.settings import Settings
from lora_adapters.train.options.values import required
from lora_adapters.train.samplers import SAMPLERS
from lora_adapters.types.dylora.rank_controller import controllers, set_rank

log = logging.getLogger(__name__)

_GAP = 4  # pixels between the images of a grid


@dataclass(frozen=True)
class Prompt:
    """The settings of one sample image.

    `scale` is the guidance scale; None uses the family's default. If `seed` is None, the run's seed is used.
    """

    prompt: str
    negative_prompt: str = ""
    width: int = 512
    height: int = 512
    sample_steps: int = 30
    scale: float | None = None
    seed: int | None = None
    sample_sampler: str | None = None


_LETTERS = {
    "w": LineOption("width", whole, WHOLE),
    "h": LineOption("height", whole, WHOLE),
    "d": LineOption("seed", whole, WHOLE),
    "s": LineOption("sample_steps", whole, WHOLE),
    "l": LineOption("scale", number, "a number"),
    "n": LineOption("negative_prompt", empty=True),
    "ss": LineOption("sample_sampler"),
}
_KINDS: dict[str, Callable[[Any], Any]] = {
    "width": int, "height": int, "seed": int, "sample_steps": int, "scale": number,
}  # fmt: skip


def wants_samples(settings: Settings) -> bool:
    """Whether the settings have prompts for sample images and say when to draw them."""
    occasion = settings.sample_every_n_steps or settings.sample_every_n_epochs or settings.sample_at_first
    return bool(occasion and settings.sample_prompts)


def check_samples(settings: Settings) -> None:
    """Raise TrainingError if the prompt file cannot be read, or a sampler does not fit the settings."""
    if not wants_samples(settings):
        if settings.sample_prompts:  # kohya's GUI always names a file
            occasions = "--sample_every_n_steps, --sample_every_n_epochs or --sample_at_first"
            log.warning("--sample_prompts: no images will be drawn without %s", occasions)
        return
    for prompt in read_prompts(Path(required(settings.sample_prompts, "--sample_prompts")), log.warning):
        check_sampler(prompt.sample_sampler or settings.sample_sampler, settings.zero_terminal_snr)


def check_samplers_fit(settings: Settings, models: BaseModels, prompts: list[Prompt]) -> None:
    """Raise TrainingError for a sampler that does not support the base model's noise schedule."""
    if models.family.has_flow:
        _say_unread(settings, models, prompts)
        return
    for prompt in prompts:
        name = prompt.sample_sampler or settings.sample_sampler
        try:
            check_sampler(name, models.zero_terminal_snr)
        except TrainingError as error:
            raise TrainingError(f"{models.name} was trained with zero terminal SNR, and {error}") from None


def _say_unread(settings: Settings, models: BaseModels, prompts: list[Prompt]) -> None:
    """Warn of samplers and negative prompts, which flow matching models do not use."""
    title = models.family.title
    asked = next((prompt.sample_sampler for prompt in prompts if prompt.sample_sampler), None)
    asked = asked or (settings.sample_sampler if "sample_sampler" in settings.given else None)
    if prompts and asked:
        log.warning("the sampler %s is ignored: %s uses the flow matching Euler sampler", asked, title)
    if not models.family.reads_negative_prompt and any(prompt.negative_prompt for prompt in prompts):
        log.warning("negative prompts are ignored: %s does not use them", title)


def read_prompts(file: Path, leave_out: Callable[[str], None] = log.debug) -> list[Prompt]:
    """Read sample prompts from a file.

    A txt file has one prompt per line, followed by options such as --w 512; # begins a comment. A toml file has a
    table [prompt] with common options and a table [[prompt.subset]] for each prompt. A json file has a list of objects
    or of lines as in a txt file.

    Args:
        file: The file.
        leave_out: Called with a message for each invalid option of a prompt. The option is ignored, as in kohya's
            trainer.

    Returns:
        The prompts, at least one.

    Raises:
        TrainingError: The file is missing, has no prompt, or cannot be read.
    """
    named = f"--sample_prompts {file}"
    text = read_prompt_file(file, "--sample_prompts")
    try:
        if file.suffix == ".toml":
            table = toml_table(text).get("prompt", {})
            if not isinstance(table, dict) or not isinstance(table.get("subset", []), list):
                raise TrainingError(f"{named}: [prompt] must be a table and [[prompt.subset]] a list of tables")
            common = {key: value for key, value in table.items() if key != "subset"}
            entries = [
                ({**common, **entry}, named) if isinstance(entry, dict) else (entry, named)
                for entry in table.get("subset", [])
            ]
        elif file.suffix == ".json":
            loaded = json_value(text)
            entries = [(entry, named) for entry in loaded] if isinstance(loaded, list) else []
        else:
            entries = list(numbered_lines(text, named))
    except TrainingError:
        raise
    except ValueError as error:
        raise TrainingError(f"{named}: {error}") from None
    if not entries:
        raise TrainingError(f"{named} has no prompts")
    return [_prompt(entry, where, leave_out) for entry, where in entries]


def _prompt(entry: Any, where: str, leave_out: Callable[[str], None]) -> Prompt:
    if isinstance(entry, str):
        entry = parse_line(entry, _LETTERS, where, leave_out=leave_out)
    names = [field.name for field in fields(Prompt)]
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
        raise TrainingError(f"{where}: {entry!r:.80} has no prompt")
    values: dict[str, Any] = {}
    for key, value in entry.items():
        if key not in names:
            leave_out(f"{where}: {key} is not one of {', '.join(names)}; ignored")
            continue
        try:
            values[key] = _KINDS.get(key, str)(value)
        except (ValueError, TypeError, OverflowError):
            leave_out(f"{where}: {key} cannot be {value!r:.80}; ignored")
    if values.get("sample_sampler") and values["sample_sampler"] not in SAMPLERS:
        leave_out(f"{where}: unknown sampler {values['sample_sampler']}, --sample_sampler is used; "
                  f"known are {', '.join(SAMPLERS)}")  # fmt: skip
        del values["sample_sampler"]
    seed = values.get("seed")
    if seed is not None and not 0 <= seed < 2**64:
        if seed >= 2**64:  # as in other programs, a negative seed means any seed
            leave_out(f"{where}: seeds are 0 to {2**64 - 1}, not {seed}; ignored")
        del values["seed"]
    made = Prompt(**values)
    for side in ("width", "height"):
        pixels, said = multiple_of_8(getattr(made, side), where)
        if said:
            leave_out(said)
        sides: dict[str, Any] = {side: pixels}
        made = replace(made, **sides)
    return replace(made, sample_steps=max(1, min(1000, made.sample_steps)))


def spread(ranks: list[int], most: int) -> list[int]:
    """At most `most` of the ranks, evenly spaced, always including the highest."""
    if len(ranks) <= most:
        return ranks
    return [ranks[round((i + 1) * len(ranks) / most) - 1] for i in range(most)]


@torch.no_grad()
def sample(models: BaseModels, settings: Settings, prompts: list[Prompt], device: Any, context: Any) -> Image.Image:
    """Draw the sample prompts with the current weights.

    Args:
        models: The base model with the adapter, in evaluation mode.
        settings: The settings of the run.
        prompts: At least one.
        device: The device to draw on. The VAE and the text encoders are moved there and back.
        context: A function that returns a context manager for the pipeline, for mixed precision.

    Returns:
        An image with a column for each prompt and, for DyLoRA, a labelled row for each of up to four ranks.
    """
    adapters = list(models.components.values())
    dials = controllers(adapters)
    at = {id(dial): dial.rank for dial in dials}
    ranks: list[int | None] = list(spread(max((dial.ranks for dial in dials), key=len), 4)) if dials else [None]
    home = [next(module.parameters()).device for module in (models.vae, *models.text_encoders)]
    for module in (models.vae, *models.text_encoders):
        module.to(device)
    try:
        rows = []
        for rank in ranks:
            if rank is not None:
                set_rank(adapters, rank)
            rows.append([_draw(models, settings, prompt, nth, context) for nth, prompt in enumerate(prompts)])
    finally:
        for dial in dials:
            dial.set_rank(at[id(dial)])
        for module, place in zip((models.vae, *models.text_encoders), home, strict=True):
            module.to(place)
    if not dials:
        return grid(rows)
    labels = [f"rank {rank}" for rank in ranks]
    return draw_sheet(list(zip(labels, rows, strict=True)), [prompt.prompt for prompt in prompts])


def _draw(models: BaseModels, settings: Settings, prompt: Prompt, nth: int, context: Any) -> Any:
    name = prompt.sample_sampler or settings.sample_sampler
    zero = settings.zero_terminal_snr
    scheduler = models.family.sampler(name, models.prediction_type, zero, models.schedule_config)
    pipe: Any = models.pipeline(scheduler)  # Any: type checkers see diffusers' dummy classes for missing packages
    pipe.set_progress_bar_config(disable=True)
    seed = (required(settings.seed, "--seed") + nth) % 2**64 if prompt.seed is None else prompt.seed
    with context():
        positive, negative = (_encode(models, settings, text) for text in (prompt.prompt, prompt.negative_prompt))
        return pipe(
            **models.family.prompt_arguments(positive, negative),
            width=prompt.width,
            height=prompt.height,
            num_inference_steps=prompt.sample_steps,
            guidance_scale=models.family.guidance if prompt.scale is None else prompt.scale,
            generator=torch.Generator().manual_seed(seed),
        ).images[0]


def _encode(models: BaseModels, settings: Settings, text: str) -> Encoded:
    chunks = (settings.max_token_length or 75) // 75
    return models.encode(models.tokenize([text], chunks, settings.weighted_captions), settings.clip_skip)


def grid(rows: list[list[Image.Image]]) -> Image.Image:
    """Paste images into one grid, 4 pixels apart; every cell has the size of the largest image."""
    images = [image for row in rows for image in row]
    cell = tuple(max(sides) + _GAP for sides in zip(*(image.size for image in images), strict=True))
    cells = [Image.new("RGB", cell, "white") for _ in images]
    for background, image in zip(cells, images, strict=True):
        background.paste(image)
    sheet = make_image_grid(cells, len(rows), len(rows[0]))
    return sheet.crop((0, 0, sheet.width - _GAP, sheet.height - _GAP))


def write_samples(image: Image.Image, settings: Settings, name: str) -> Path:
    """Save the image as <output_dir>/sample/<name>.png."""
    file = Path(required(settings.output_dir, "--output_dir")) / "sample" / f"{name}.png"
    with replacing(file) as partial:
        image.save(partial, format="png")
    return file
