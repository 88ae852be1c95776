"""Checks that options and images fit the base model, and chooses its noise schedule."""

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
    """Raise OptionError for options that are not for this family, before the base model is loaded.

    Args:
        settings: The settings of the run.
        family: The family according to the base model's files; None if only loading can tell.
    """
    if family is not None:
        check_family_options(settings, family)
    if isinstance(family, TransformerFamily):
        check_parts(settings, family)


def check_base_model(settings: Settings, models: BaseModels, data: TrainingData) -> None:
    """Raise OptionError if options or images do not fit this base model, TrainingError if it cannot be trained."""
    if not models.family.trained:
        raise not_known(models.name, models.family.title)
    check_family_options(settings, models.family)
    if family_on_disk(settings) is None:
        adapters.warn_without_effect(settings, models.family)
    check_clip_skip(models, settings.clip_skip)
    swapped_blocks(models, settings.blocks_to_swap)  # raises if the model has fewer blocks
    check_sizes(models, data)


def noise_schedule(settings: Settings, models: BaseModels) -> Any:
    """The DDPM schedule of the base model, or the flow matching objective for a flow matching model."""
    if models.prediction_type == FLOW:
        return FlowMatching(FlowOptions.of(settings, models.family.image_loss))
    return models.noise_schedule(settings.zero_terminal_snr)


def check_sizes(models: BaseModels, data: TrainingData) -> None:
    """Raise OptionError for buckets whose sides are not multiples of the family's pixel step."""
    step = models.family.pixel_step
    for _, (width, height) in data.images.group_buckets:
        if width % step or height % step:
            raise OptionError(
                f"a bucket of {width}x{height} pixels: sides must be multiples of {step} for {models.family.title}; "
                f"set --resolution and --bucket_reso_steps to multiples of {step}"
            )
