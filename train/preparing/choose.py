"""Chooses settings for the images, the base model and the GPU, each with its reason."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_adapters.convert.parsing import json_value, read_text
from lora_adapters.train.errors import OptionError, TrainingError
from lora_adapters.train.preparing.look import Folder
from lora_adapters.train.preparing.options import InitSettings
from lora_adapters.train.preparing.presets import Choice, Preset, for_machine, named, presets

_SEEN = "the images"
_HELD_OUT_FROM = 20  # images; with fewer, all are used for training
_PROMPTS = 2


@dataclass(frozen=True)
class Plan:
    """The content of the files: options of config.toml, dataset options, subset options of each folder, and prompts."""

    presets: Sequence[Preset]
    options: Mapping[str, Choice]
    dataset: Mapping[str, Choice]
    subsets: Sequence[Mapping[str, Choice]]
    prompts: Sequence[str]


def plan(folders: Sequence[Folder], settings: InitSettings) -> Plan:
    """Choose settings for these folders. OptionError for an unknown base model, TrainingError for a damaged one."""
    model = settings.pretrained_model_name_or_path
    if not model:
        raise OptionError(
            "--model is missing: give a checkpoint file, a Diffusers folder or a Hub id such as "
            "stable-diffusion-v1-5/stable-diffusion-v1-5"
        )
    chosen = [named(name) for name in settings.preset or []] or _presets(model, settings)
    left_out, step = _of_family(chosen)
    options = {key: choice for preset in chosen for key, choice in preset.options.items() if key not in left_out}
    dataset = {key: choice for preset in chosen for key, choice in preset.dataset.items()}
    if "resolution" not in dataset:
        raise OptionError(f"--preset {' '.join(settings.preset or [])}: add a preset for a machine, such as sd15-8gb")
    side = _trained_side(model)
    if side is not None and side != dataset["resolution"].value:
        dataset["resolution"] = Choice(side, "what the model was trained at", f"{model}: unet/config.json")
    dataset |= _from_images(folders, int(dataset["resolution"].value), step)
    subsets = [_subset(folder, settings) for folder in folders]
    return Plan(chosen, _options(options, dataset, folders, settings), dataset, subsets, _prompts(folders, subsets))


def _of_family(chosen: Sequence[Preset]) -> tuple[frozenset[str], int]:
    """(options without an effect for the presets' family, number that image sides must be multiples of)."""
    from lora_adapters.train.models.registry import FAMILIES
    from lora_adapters.train.options.families import unused_options

    family = next((FAMILIES[preset.family] for preset in chosen if preset.family is not None), None)
    return (frozenset(), 8) if family is None else (frozenset(unused_options(family)), family.pixel_step)


def _presets(model: str, settings: InitSettings) -> list[Preset]:
    """The default presets: one for the machine and one for the purpose."""
    family = settings.family or _family(model)
    purpose = next(preset for preset in presets().values() if preset.purpose == settings.purpose)
    return [for_machine(family, _card() if settings.card is None else settings.card), purpose]


def _family(model: str) -> str:
    """The family of a base model, detected from its files or, for a Hub id, from its name."""
    from lora_adapters.train.models.base import check_path, family_on_disk
    from lora_adapters.train.models.registry import name_by_repository
    from lora_adapters.train.options.model import ModelSource

    source = ModelSource(pretrained_model_name_or_path=model)
    check_path(source)
    family = family_on_disk(source)
    if family is not None:
        return family.name
    name = name_by_repository(model)
    if name is not None:
        return name
    raise OptionError(f"--family is missing: {model} may be sd (1.x, 2.x), sdxl, flux or sd3")


def _card() -> float:
    """The memory of the first CUDA device in whole GB, as GPUs are advertised; 0 without CUDA."""
    import torch

    return round(torch.cuda.get_device_properties(0).total_memory / 2**30) if torch.cuda.is_available() else 0


def _trained_side(model: str) -> int | None:
    """The resolution in pixels that a Diffusers folder's denoiser was trained at; None if no file contains it."""
    from lora_adapters.train.models.registry import FAMILIES

    files = (Path(model) / name / "config.json" for name in {family.denoiser for family in FAMILIES.values()})
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        return None
    try:
        size = json_value(read_text(file)).get("sample_size")
    except (OSError, ValueError, AttributeError) as error:
        raise TrainingError(f"{file} cannot be read ({error})") from None
    return 8 * size if isinstance(size, int) else None


def _from_images(folders: Sequence[Folder], side: int, step: int) -> dict[str, Choice]:
    """The choices that depend on the images' shapes, sizes and number. Bucket sides are multiples of `step`."""
    sizes = [image.size for folder in folders for image in folder.readable]
    small = sum(width * height < side * side for width, height in sizes)
    shapes = len({round(width / height, 2) for width, height in sizes})
    choices = {
        "enable_bucket": Choice(True, f"{shapes} shapes: each image keeps its own" if shapes > 1 else
                                "images keep their shape", _SEEN),
    }  # fmt: skip
    steps = 64
    if side < 4 * steps:
        steps = max(step, side // 8 // step * step)
        choices["bucket_reso_steps"] = Choice(steps, f"steps of 64 are too coarse for {side} pixels", "the resolution")
    if small and all(min(size) >= steps for size in sizes):
        why = f"{small} images have fewer pixels than {side}x{side}: they are not enlarged"
        choices["bucket_no_upscale"] = Choice(True, why, _SEEN)
    if len(sizes) >= _HELD_OUT_FROM:
        choices["validation_split"] = Choice(0.1, f"of {len(sizes)} images some can be held out to measure with", _SEEN)
    return choices


def _subset(folder: Folder, settings: InitSettings) -> dict[str, Choice]:
    """The subset options of one folder."""
    choices = {"image_dir": Choice(folder.path.as_posix(), f"{len(folder.readable)} images", _SEEN)}
    ending = folder.ending
    if ending is not None:
        choices["caption_extension"] = Choice(ending, f"{folder.endings[ending]} images have such a caption", _SEEN)
    missing = len(folder.uncaptioned(ending)) if ending else len(folder.readable)
    if missing:
        tokens, source = settings.class_tokens or folder.class_tokens, "--class_tokens"
        if settings.class_tokens is None:
            source = "the folder's name" if folder.class_tokens else "a guess: give --class_tokens"
        choices["class_tokens"] = Choice(tokens or "a photo", f"caption of {missing} images that have none", source)
    if folder.repeats > 1:
        choices["num_repeats"] = Choice(folder.repeats, "how often an epoch shows each image", "the folder's name")
    return choices


def _options(
    options: Mapping[str, Choice], dataset: Mapping[str, Choice], folders: Sequence[Folder], settings: InitSettings
) -> dict[str, Choice]:
    """The options of config.toml: those from the command line first, then those of the presets."""
    out = Path(settings.out)
    name = settings.output_name or folders[0].path.resolve().name
    own = {
        "pretrained_model_name_or_path": Choice(settings.pretrained_model_name_or_path, "the base model", "--model"),
        "dataset_config": Choice((out / "dataset.toml").as_posix(), "the images", "this program"),
        "output_dir": Choice(settings.output_dir, "where the adapter and its report will be", "--output_dir"),
        "output_name": Choice(name, "the adapter's name", "--output_name" if settings.output_name else "the folder"),
    }
    batch, chosen = int(dataset["batch_size"].value), {**own, **options}
    if "max_train_steps" in chosen and batch > 1:
        steps = chosen["max_train_steps"]
        fewer = max(1, int(steps.value) // batch)
        chosen["max_train_steps"] = Choice(fewer, f"{steps.value} images, {batch} a step", steps.source)
        if "save_every_n_steps" in chosen:
            saves = chosen["save_every_n_steps"]
            chosen["save_every_n_steps"] = Choice(max(1, int(saves.value) // batch), saves.why, saves.source)
    if "save_every_n_steps" in chosen:
        every = Choice(chosen["save_every_n_steps"].value, "see what it has learned, at each save", "this program")
        prompts = Choice((out / "prompts.txt").as_posix(), "what to draw", "this program")
        chosen |= {"sample_every_n_steps": every, "sample_prompts": prompts}
    return chosen


def _prompts(folders: Sequence[Folder], subsets: Sequence[Mapping[str, Choice]]) -> list[str]:
    """Prompts for sample images: the first captions, or the class tokens."""
    captions = [line.split("\n")[0] for folder in folders for line in folder.captions.values() if line]
    tokens = [str(subset["class_tokens"].value) for subset in subsets if "class_tokens" in subset]
    return list(dict.fromkeys([*captions[:_PROMPTS], *tokens]))[:_PROMPTS] or ["a photo"]
