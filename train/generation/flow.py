"""Refuses options, or warns of options, that the base model's family does not support."""

import logging
from collections.abc import Sequence
from typing import Any

from lora_adapters.train.errors import OptionError
from lora_adapters.train.generation.options import GenerateSettings
from lora_adapters.train.generation.requests import ImageRequest
from lora_adapters.train.models.family import TrainingFamily
from lora_adapters.train.models.part_files import check_parts
from lora_adapters.train.models.transformer import TransformerFamily
from lora_adapters.train.options.model import PARTS
from lora_adapters.train.options.option import options_of

log = logging.getLogger(__name__)

_OF_UNETS = (
    "v2", "v_parameterization", "zero_terminal_snr", "clip_skip", "max_embeddings_multiples", "emb_normalize_mode",
    "force_scheduler_zero_steps_offset", "xformers", "diffusers_xformers",
)  # fmt: skip

# Options that need our own handling of text, latents or VAE, or separate files, instead of a plain pipeline call.
_STEP_BY_STEP = ("image_path", "no_half_vae", "opt_channels_last", "vae_batch_size", "vae", *PARTS)


def check_options(settings: GenerateSettings, family: TrainingFamily) -> None:
    """Check the options of the program against the family of the base model.

    Args:
        settings: The options of the program.
        family: The family of the base model.

    Raises:
        OptionError: An option has no effect for this family.
        TrainingError: A file that an option names is missing.
    """
    known = options_of(GenerateSettings)
    for name in _OF_UNETS if family.has_flow else PARTS:
        if getattr(settings, name) != known[name].default:
            others = "models with a U-Net" if family.has_flow else "Flux.1 and SD3"
            raise OptionError(f"{known[name].flag} is for {others}, and the model is {family.title}: leave it out")
    for name in () if family.trained else _STEP_BY_STEP:
        if getattr(settings, name) != known[name].default:
            raise OptionError(f"{known[name].flag} is not supported for {family.title}: leave it out")
    if not family.has_flow:
        return
    if any(part.startswith("sampler=") for part in settings.sweep or []):
        raise OptionError(f"--sweep sampler=: {family.title} has only one sampler, flow matching Euler")
    if isinstance(family, TransformerFamily):
        check_parts(settings, family)


def say_unread(settings: GenerateSettings, requests: Sequence[ImageRequest], family: TrainingFamily) -> None:
    """Warn of samplers and negative prompts that this family does not use.

    Args:
        settings: The options of the program.
        requests: The requested images.
        family: The family of the base model.
    """
    if not family.has_flow:
        return
    asked = next((one.sampler for one in requests if one.sampler != _default("sampler")), None)
    asked = asked or (settings.sampler if "sampler" in settings.given else None)
    if asked:
        log.warning("the sampler %s is ignored: %s uses the flow matching Euler sampler", asked, family.title)
    if not family.reads_negative_prompt and any(one.negative_prompt for one in requests):
        log.warning("negative prompts are ignored: %s does not use them", family.title)


def _default(name: str) -> Any:
    return options_of(GenerateSettings)[name].default
