"""Plans a run: collects the requested images and adapters, and checks everything possible before loading the model."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lora_adapters.convert.errors import AdapterError
from lora_adapters.convert.families.detection import check_one_family
from lora_adapters.train.data.image_suffixes import READ
from lora_adapters.train.errors import OptionError, TrainingError
from lora_adapters.train.generation.draw import start_image
from lora_adapters.train.generation.flow import check_options
from lora_adapters.train.generation.image_grid import font_of
from lora_adapters.train.generation.networks import Network, networks, unmerged
from lora_adapters.train.generation.options import GenerateSettings
from lora_adapters.train.generation.png_info import prompts_in, read_text
from lora_adapters.train.generation.prompt_lines import numbered_lines, read_prompt_file
from lora_adapters.train.generation.requests import ImageRequest, check_sizes, requests
from lora_adapters.train.generation.sweeps import Column, check_lines, check_rank, columns
from lora_adapters.train.models.base import check_fixed_clip_skip, check_path, family_on_disk
from lora_adapters.train.models.family import TrainingFamily
from lora_adapters.train.models.registry import KIND_FLAGS
from lora_adapters.train.options.settings import check_ranges

_ONE_OF = (
    ("prompt", "from_file"),
    tuple(KIND_FLAGS),
    ("fp16", "bf16"),
    ("network_merge", "network_merge_n_models"),
    ("network_merge", "network_pre_calc"),
    ("use_original_file_name", "sequential_file_name"),
    ("sweep", "use_original_file_name"),
    ("sweep", "sequential_file_name"),
)


@dataclass(frozen=True)
class Plan:
    """The requested images, the adapters, and the columns of the sheet (empty without --sweep)."""

    requests: list[ImageRequest]
    networks: list[Network]
    columns: list[Column]


def plan(settings: GenerateSettings) -> Plan:
    """Read and check everything that does not need the loaded model."""
    _check(settings)
    starts = _starts(settings)
    lines = _lines(settings, starts)
    images = requests(settings, lines, starts)
    adapters = networks(settings)
    check_one_family({network.source: network.adapter for network in adapters})
    family = family_on_disk(settings)
    if family is not None:
        check_options(settings, family)
        check_sizes(images, family)
        _check_family(settings, adapters, family)
    live = unmerged(adapters)
    for request in images:
        _check_networks(request, live)
    made = columns(settings.sweep, adapters, settings) if settings.sweep else []
    check_lines(lines, made)
    for request in {request.start: request for request in images if request.start is not None}.values():
        start_image(request)
    font_of(settings.sheet_font, 14)
    return Plan(_filled(images, live), adapters, made)


def _check(settings: GenerateSettings) -> None:
    if not settings.pretrained_model_name_or_path:
        raise OptionError("--ckpt is missing: give a checkpoint file, a Diffusers folder or a Hub repository")
    for group in _ONE_OF:
        if sum(bool(getattr(settings, name)) for name in group) > 1:
            raise OptionError(f"--{' and --'.join(group)} exclude each other: give one")
    check_ranges(settings)
    for name in ("strength", "use_original_file_name"):
        value = getattr(settings, name)
        if value is not None and value is not False and not settings.image_path:
            raise OptionError(f"--{name} is for --image_path, which is not given")
    for name in ("sheet", "sheet_font"):
        if getattr(settings, name) and not settings.sweep:
            raise OptionError(f"--{name} is for --sweep, which is not given")
    if settings.sheet and Path(settings.sheet).suffix.lower() != ".png":
        raise OptionError(f"--sheet {settings.sheet}: its name must end in .png")
    check_path(settings)
    if Path(settings.outdir).exists() and not Path(settings.outdir).is_dir():
        raise TrainingError(f"--outdir {settings.outdir} is not a folder")
    if settings.sdpa and (settings.xformers or settings.diffusers_xformers):
        raise OptionError("give one of --xformers and --sdpa")
    if settings.xformers or settings.diffusers_xformers:
        _check_xformers()


def _check_xformers() -> None:
    if not torch.cuda.is_available():
        raise TrainingError("--xformers needs a CUDA device; use --sdpa")
    try:
        import xformers  # noqa: F401
    except ImportError:
        raise TrainingError("--xformers: the package xformers is not installed; use --sdpa") from None


def _starts(settings: GenerateSettings) -> list[Path]:
    """The images of --image_path, sorted by name."""
    if not settings.image_path:
        return []
    path = Path(settings.image_path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise TrainingError(f"--image_path {path} does not exist")
    images = sorted(file for file in path.iterdir() if file.suffix.lower() in READ)
    if not images:
        raise TrainingError(f"--image_path {path} has no images")
    return images


def _lines(settings: GenerateSettings, starts: Sequence[Path]) -> list[tuple[str, str]]:
    """(prompt line, its place for messages): from the options, or else from the metadata of the input images."""
    if settings.prompt is not None:
        return [(settings.prompt, "--prompt")]
    if settings.from_file:
        lines = [*numbered_lines(read_prompt_file(Path(settings.from_file), "--from_file"), settings.from_file)]
        if not lines:
            raise TrainingError(f"--from_file {settings.from_file} has no prompts")
        return lines
    if not starts:
        raise OptionError("there is no prompt: give --prompt or --from_file")
    lines = []
    for start in starts:
        try:
            text = read_text(start)
        except OSError as error:
            raise TrainingError(f"--image_path {start} cannot be read as an image ({error})") from None
        if not text:
            raise TrainingError(f"{start} contains no prompt: give --prompt or --from_file")
        prompt, negative = prompts_in(text)
        lines.append((f"{prompt} --n {negative}" if negative else prompt, str(start)))
    return lines


def _check_family(settings: GenerateSettings, networks: Sequence[Network], family: TrainingFamily) -> None:
    model = settings.pretrained_model_name_or_path
    for network in networks:
        candidates = network.adapter.candidates
        if family.name not in [own.name for own in candidates]:
            raise AdapterError(f"{network.source} is for {candidates[0].title}, but {model} is {family.title}")
    check_fixed_clip_skip(family, settings.clip_skip)


def _check_networks(request: ImageRequest, live: Sequence[Network]) -> None:
    if request.multipliers is not None and len(request.multipliers) > len(live):
        many = len(request.multipliers)
        raise TrainingError(f"{request.where}: --am has {many} for {len(live)} adapters that are not merged")
    if request.rank is not None:
        try:
            check_rank(request.rank, live, "--rank")
        except TrainingError as error:
            raise TrainingError(f"{request.where}: {error}") from None


def _filled(images: Sequence[ImageRequest], live: Sequence[Network]) -> list[ImageRequest]:
    """Extend each request's --am to all adapters by repeating its last multiplier."""
    filled = []
    for request in images:
        own = request.multipliers
        filled.append(
            request if own is None else replace(request, multipliers=(*own, *[own[-1]] * (len(live) - len(own))))
        )
    return filled
