"""Refuses options that have no effect on the base model's family."""

from typing import Any

from lora_adapters.train.errors import OptionError
from lora_adapters.train.options.flow import FlowOptions
from lora_adapters.train.options.model import PARTS
from lora_adapters.train.options.option import options_of
from lora_adapters.train.options.settings import Settings

# Options for DDPM schedules (noise and v prediction), attention in U-Nets, and windows of CLIP tokens.
_NOT_FLOW = (
    "v2", "v_parameterization", "min_snr_gamma", "noise_offset", "multires_noise_iterations", "ip_noise_gamma",
    "zero_terminal_snr", "debiased_estimation_loss", "scale_v_pred_loss_like_noise_pred", "v_pred_like_loss",
    "clip_skip", "max_token_length", "weighted_captions", "xformers",
)  # fmt: skip


def unused_options(family: Any) -> tuple[str, ...]:
    """Training options that have no effect on a base model of `family` (TrainingFamily)."""
    names = _NOT_FLOW if family.has_flow else (*options_of(FlowOptions), *PARTS)
    return names + tuple(family.unused_options)


def check_family_options(settings: Settings, family: Any) -> None:
    """Raise OptionError for the first option that has no effect on a base model of `family` (TrainingFamily)."""
    known = options_of(Settings)
    other = "noise or v prediction with a U-Net" if family.has_flow else "flow matching"
    for name in unused_options(family):
        if getattr(settings, name) != known[name].default:
            reason = f"{other}" if name not in family.unused_options else "other models"
            raise OptionError(f"{known[name].flag} is for {reason}, and the base model is {family.title}: leave it out")
    if family.has_flow and settings.loss_type in ("huber", "smooth_l1") and settings.huber_schedule == "snr":
        raise OptionError(
            "--huber_schedule snr needs a noise schedule, which flow matching lacks: give constant or exponential"
        )
