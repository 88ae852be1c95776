"""The requested images: prompt and settings of each, from the options and the prompt lines."""

import logging
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_adapters.convert.parsing import number
from lora_adapters.convert.portable import forbidden, same_file_key
from lora_adapters.train.data.image_suffixes import WRITTEN
from lora_adapters.train.errors import TrainingError
from lora_adapters.train.generation.options import GenerateSettings
from lora_adapters.train.generation.prompt_lines import WHOLE, LineOption, multiple_of_8, parse_line, whole
from lora_adapters.train.generation.refused import UNSUPPORTED_IN_LINES
from lora_adapters.train.models.family import TrainingFamily
from lora_adapters.train.models.registry import FAMILIES
from lora_adapters.train.models.schedulers import check_sampler

log = logging.getLogger(__name__)
SEEDS = 2**32


@dataclass(frozen=True)
class ImageRequest:
    """A request for one image. Sizes are in pixels; None means the model's default size, or the input image's size.

    where: the option or line of the request, for errors. scale: None means the model's default. multipliers: one for
    each adapter that is not merged; None means their own. strength and start (the input image) are for img2img.
    original_* and crop_* are size conditions of SDXL. file: the file name, if given.
    """

    prompt: str
    where: str
    seed: int
    steps: int
    scale: float | None
    sampler: str
    negative_prompt: str = ""
    width: int | None = None
    height: int | None = None
    start: Path | None = None
    strength: float | None = None
    multipliers: tuple[float, ...] | None = None
    rank: int | None = None
    original_width: int | None = None
    original_height: int | None = None
    negative_original_width: int | None = None
    negative_original_height: int | None = None
    crop_top: int | None = None
    crop_left: int | None = None
    file: str | None = None


_SIZES = {
    "original_width": "--ow",
    "original_height": "--oh",
    "negative_original_width": "--nw",
    "negative_original_height": "--nh",
    "crop_top": "--ct",
    "crop_left": "--cl",
}


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(number(part) for part in text.split(","))


def _seeds(text: str) -> tuple[int, ...]:
    return tuple(whole(part.strip()) for part in text.split(","))


OPTIONS: dict[str, LineOption] = {
    "n": LineOption("negative_prompt", empty=True),
    "w": LineOption("width", whole, WHOLE),
    "h": LineOption("height", whole, WHOLE),
    "s": LineOption("steps", whole, WHOLE),
    "d": LineOption("seeds", _seeds, "seeds with commas between them"),
    "l": LineOption("scale", number, "a number"),
    "t": LineOption("strength", number, "a number above 0 and up to 1"),
    "am": LineOption("multipliers", _numbers, "numbers with commas between them"),
    "f": LineOption("file", str, "a file name"),
    "ss": LineOption("sampler", str, "a sampler"),
    "rank": LineOption("rank", whole, WHOLE),
    **{flag.removeprefix("--"): LineOption(field, whole, WHOLE) for field, flag in _SIZES.items()},
}


def requests(
    settings: GenerateSettings, lines: Sequence[tuple[str, str]], starts: Sequence[Path] = ()
) -> list[ImageRequest]:
    """All requested images, in order.

    Args:
        settings: The settings.
        lines: Prompt lines, each with its place for messages.
        starts: Input images for img2img, used in turn.

    Returns:
        A request for each image.

    Raises:
        TrainingError: A line is invalid; the message mentions its place.
    """
    tables = [(parse_line(line, OPTIONS, where, UNSUPPORTED_IN_LINES), where) for line, where in lines]
    common = {name: getattr(settings, name) for name in ("steps", "scale", "sampler", *_SIZES)}
    common |= _in_8s({"width": settings.W, "height": settings.H}, "--W, --H")
    tables = [({**table, **_in_8s(table, where)}, where) for table, where in tables]
    if starts:
        common["strength"] = 0.8 if settings.strength is None else settings.strength
    single = len(tables) == settings.images_per_prompt == settings.n_iter == 1
    draw = random.Random(settings.seed)
    made: list[ImageRequest] = []
    for _ in range(settings.n_iter):
        shared = draw.randrange(SEEDS) if settings.iter_same_seed else None
        if settings.shuffle_prompts:
            draw.shuffle(tables)
        for table, where in tables:
            own = {**common, **table}
            seeds = own.pop("seeds", None)
            if seeds is None and single and settings.seed is not None:
                seeds = (settings.seed,)
            for nth, seed in enumerate(_chosen(seeds, shared, draw, settings.images_per_prompt, where)):
                file = _numbered(own["file"], nth) if "file" in own else None
                start = starts[len(made) % len(starts)] if starts else None
                made.append(ImageRequest(**{**own, "seed": seed, "where": where, "start": start, "file": file}))
                _check(made[-1], settings)
    _check_files(made)
    return made


def _in_8s(sizes: Mapping[str, Any], where: str) -> dict[str, int | None]:
    """Round width and height in `sizes` to multiples of 8, with a warning if that changes them."""
    rounded: dict[str, int | None] = {}
    for name in ("width", "height"):
        if name not in sizes:
            continue
        rounded[name] = side = sizes[name]
        if side is not None:
            rounded[name], said = multiple_of_8(side, where)
            if said:
                log.warning("%s", said)
    return rounded


def _chosen(
    seeds: Sequence[int] | None, shared: int | None, draw: random.Random, count: int, where: str
) -> Sequence[int]:
    """The seeds of a prompt's images: the given seeds or the shared one, continued by counting up, else random ones."""
    if seeds is None and shared is None:
        return [draw.randrange(SEEDS) for _ in range(count)]
    first = [shared or 0] if seeds is None else list(seeds)
    if len(first) > count:
        raise TrainingError(f"{where}: --d has {len(first)} seeds for --images_per_prompt {count}")
    if any(seed >= SEEDS for seed in first):
        raise TrainingError(f"{where}: seeds must be below {SEEDS}")
    return [*first, *((first[-1] + n) % SEEDS for n in range(1, count - len(first) + 1))]


def _check(request: ImageRequest, settings: GenerateSettings) -> None:
    where = request.where
    if not request.prompt:
        raise TrainingError(f"{where}: there is no prompt")
    if re.search(r"\{[^{}]*\|[^{}]*\}", request.prompt):
        raise TrainingError(f"{where}: choices like {{a|b}} are not supported; write each prompt on its own line")
    if not 1 <= request.steps <= 1000:
        raise TrainingError(f"{where}: {request.steps} steps: give 1 to 1000")
    if request.start is not None and (request.width is None) != (request.height is None):
        raise TrainingError(f"{where}: only one of width and height is given for img2img: give both")
    if request.strength is not None:
        if request.start is None:
            raise TrainingError(f"{where}: --t (strength) is for --image_path, which is not given")
        if not 0 < request.strength <= 1:
            raise TrainingError(f"{where}: strength {request.strength} must be above 0 and at most 1")
        if int(request.steps * request.strength) < 1:
            raise TrainingError(f"{where}: strength {request.strength} leaves no steps of {request.steps}")
    try:
        check_sampler(request.sampler, settings.zero_terminal_snr)
    except TrainingError as error:
        raise TrainingError(f"{where}: {error}") from None


def _numbered(name: str, nth: int) -> str:
    if not nth:
        return name
    path = Path(name)
    return str(path.with_name(f"{path.stem}-{nth + 1}{path.suffix}"))


def _check_files(made: Sequence[ImageRequest]) -> None:
    seen: dict[str, ImageRequest] = {}
    for request in made:
        if request.file is None:
            continue
        path = Path(request.file)
        if path.anchor or ".." in path.parts:  # on Windows, C:x is outside and is not absolute
            raise TrainingError(f"{request.where}: --f {request.file} is outside --outdir")
        if why := forbidden(request.file):
            raise TrainingError(f"{request.where}: --f {request.file}: {why}")
        if path.suffix.lower() not in ("", *WRITTEN):
            raise TrainingError(f"{request.where}: --f {request.file}: must end in one of {', '.join(WRITTEN)}")
        key = same_file_key(request.file)
        if key in seen:
            before = seen[key].where
            raise TrainingError(f"{request.where}: the name {request.file} is taken already ({before})")
        seen[key] = request


def check_sizes(made: Sequence[ImageRequest], family: TrainingFamily) -> None:
    """Raise TrainingError if size conditions are given for a family that does not use them."""
    if family.has_sizes:
        return
    titles = " and ".join(other.title for other in FAMILIES.values() if other.has_sizes)
    for request in made:
        for field, flag in _SIZES.items():
            if getattr(request, field) is not None:
                raise TrainingError(f"{request.where}: {flag} ({field}) is for {titles}, which the model is not")
