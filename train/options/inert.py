"""Values that change nothing, and options that have no effect beside the others: left out with a warning, no error.

Configurations are handed on from program to program, and kohya's trainer takes these without a word.
"""

import argparse
import logging
from typing import Any

log = logging.getLogger(__name__)

# 0 stands for "not given"
_OFF_AT_ZERO = (
    "save_every_n_steps", "save_every_n_epochs", "validate_every_n_steps", "validate_every_n_epochs",
    "max_validation_steps", "max_train_epochs", "clip_skip", "lr_scheduler_timescale",
)  # fmt: skip
_SAMPLES = ("sample_every_n_steps", "sample_every_n_epochs")
_DEEPSPEED = (
    "zero_stage", "offload_optimizer_device", "offload_optimizer_nvme_path", "offload_param_device",
    "offload_param_nvme_path", "zero3_init_flag", "zero3_save_16bit_model", "fp16_master_weights_and_gradients",
)  # fmt: skip
_FROM_THE_START = {"initial_epoch": (0, 1), "initial_step": (0,)}


def leave_out_inert(settings: argparse.Namespace, defaults: dict[str, Any]) -> None:
    """Put the defaults in place of values in `settings` that change nothing, each with a warning.

    Args:
        settings: options as `parse` or `settings` make them; changed in place.
        defaults: the options' defaults by name.
    """
    for name in _OFF_AT_ZERO:
        if getattr(settings, name) == 0:
            _reset(settings, defaults, name, "0 is taken as not given")
    for name in _SAMPLES:
        value = getattr(settings, name)
        if value is not None and value <= 0:
            _reset(settings, defaults, name, f"{value} draws no sample pictures")
    if settings.vae_batch_size == 0:
        _reset(settings, defaults, "vae_batch_size", "0 is taken as 1")
    if not settings.deepspeed:
        for name in _DEEPSPEED:
            _reset(settings, defaults, name, "it has no effect without --deepspeed")
    _leave_out_start(settings, defaults)
    _leave_out_samples(settings, defaults)
    if settings.fused_backward_pass:
        _reset(settings, defaults, "fused_backward_pass", "an adapter's few weights are stepped at once, as without it")
    if settings.adaptive_noise_scale is not None and not settings.noise_offset:
        _reset(settings, defaults, "adaptive_noise_scale", "it has no effect without --noise_offset")
    if settings.huber_c <= 0 and settings.loss_type not in ("huber", "smooth_l1"):
        _reset(settings, defaults, "huber_c", f"it has no effect with --loss_type {settings.loss_type}")


def _leave_out_start(settings: argparse.Namespace, defaults: dict[str, Any]) -> None:
    """--initial_epoch and --initial_step where they say what happens anyway, and what depends on them."""
    for name, start in _FROM_THE_START.items():
        if getattr(settings, name) in start:
            _reset(settings, defaults, name, "a run starts there anyway")
    if all(getattr(settings, name) == defaults[name] for name in _FROM_THE_START):
        _reset(settings, defaults, "skip_until_initial_step", "there is no initial step to skip to")


def _leave_out_samples(settings: argparse.Namespace, defaults: dict[str, Any]) -> None:
    """The occasions for sample pictures where there are no prompts to draw them from."""
    wanted = [name for name in (*_SAMPLES, "sample_at_first") if getattr(settings, name)]
    if wanted and not settings.sample_prompts:
        log.warning("--%s: no sample pictures are drawn without --sample_prompts, a file of prompts", wanted[0])
        for name in wanted:
            setattr(settings, name, defaults[name])


def _reset(settings: argparse.Namespace, defaults: dict[str, Any], name: str, why: str) -> None:
    if getattr(settings, name) != defaults[name]:
        log.warning("--%s is left out: %s", name, why)
        setattr(settings, name, defaults[name])
