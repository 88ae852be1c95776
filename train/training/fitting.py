"""Checks that options and images fit the base model that was loaded, and chooses the noise that it is trained with."""

from typing import Any

from lora_adapters.train.data.dataset import TrainingData
from lora_adapters.train.errors import OptionError
from lora_adapters.train.models.base import BaseModels, check_clip_skip, family_on_disk
from lora_adapters.train.models.block_swap import swapped_blocks
from lora_adapters.train.models.family import TrainingFamily
from lora_adapters.train.models.noise_schedule import FLOW
from lora_adapters.train.models.part_files import check_parts
from lora_adapters.train.models.registry import not_known
from lora_adapters.train.models.transformer import TransformerFamily
from lora_adapters.train.objective.flow_matching import FlowMatching, FlowOptions
from lora_adapters.train.options.families import check_family_options
from lora_adapters.train.options.settings import Settings
from lora_adapters.train.training import adapters


def check_known_family(settings: Settings, family: TrainingFamily | None) -> None:
    """Raise OptionError for options that are not for a base model of this family, before it is loaded.

    Args:
        settings: the run's.
        family: what the base model's files tell; None where only loading shows it.
    """
    if family is not None:
        check_family_options(settings, family)
    if isinstance(family, TransformerFamily):
        check_parts(settings, family)


def check_base_model(settings: Settings, models: BaseModels, data: TrainingData) -> None:
    """Raise OptionError for options and images that do not fit this base model, TrainingError if none is trained."""
    if not models.family.trained:
        raise not_known(models.name, models.family.title)
    check_family_options(settings, models.family)
    if family_on_disk(settings) is None:
        adapters.warn_without_effect(settings, models.family)
    check_clip_skip(models, settings.clip_skip)
    swapped_blocks(models, settings.blocks_to_swap)  # raises where there are not so many
    check_sizes(models, data)


def noise_schedule(settings: Settings, models: BaseModels) -> Any:
    """The DDPM schedule of the base model; for one of flow matching, that objective."""
    if models.prediction_type == FLOW:
        return FlowMatching(FlowOptions.of(settings, models.family.image_loss))
    return models.noise_schedule(settings.zero_terminal_snr)


def check_sizes(models: BaseModels, data: TrainingData) -> None:
    """Raise OptionError for buckets whose sides the denoiser cannot read."""
    step = models.family.pixel_step
    for _, (width, height) in data.images.group_buckets:
        if width % step or height % step:
            raise OptionError(
                f"a bucket of {width}x{height} pixels: sides must be multiples of {step} for {models.family.title}; "
                f"give a --resolution and --bucket_reso_steps that are"
            )
