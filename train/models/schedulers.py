"""Samplers by kohya's names: diffusers' schedulers over Stable Diffusion's training schedule."""

import inspect
from collections.abc import Mapping
from typing import Any

import diffusers

from lora_adapters.train.errors import TrainingError
from lora_adapters.train.models.noise_schedule import STEPS, betas, ends_in_noise
from lora_adapters.train.samplers import SAMPLERS

_ZERO_SNR = "rescale_betas_zero_snr"


def check_sampler(name: str, zero_terminal_snr: bool = False) -> None:
    """Raise TrainingError for an unknown sampler, or one that does not support zero terminal SNR."""
    if name not in SAMPLERS:
        raise TrainingError(f"unknown sampler {name}; known are {', '.join(SAMPLERS)}")
    if zero_terminal_snr and not _takes_zero_snr(name):
        able = ", ".join(known for known in SAMPLERS if not known.startswith("k_") and _takes_zero_snr(known))
        raise TrainingError(f"the sampler {name} does not support --zero_terminal_snr; use one of {able}")


def sampler(
    name: str,
    prediction_type: str,
    zero_terminal_snr: bool = False,
    steps_offset: int | None = None,
    base: Mapping[str, Any] | None = None,
) -> Any:
    """The diffusers scheduler of a sampler, with the betas of the training schedule.

    Args:
        name: One of SAMPLERS.
        prediction_type: "epsilon" or "v_prediction".
        zero_terminal_snr: Whether the schedule has zero terminal SNR, so that sampling starts from pure noise.
        steps_offset: Replaces the sampler's steps_offset; None keeps it.
        base: The scheduler config of the base model. Its betas, zero terminal SNR and trailing timesteps are used.
            None uses the betas of Stable Diffusion.

    Returns:
        The scheduler.

    Raises:
        TrainingError: The sampler is unknown, or does not support zero terminal SNR.
    """
    base = base or {}
    zero_terminal_snr = zero_terminal_snr or ends_in_noise(base)
    check_sampler(name, zero_terminal_snr)
    kind, own = SAMPLERS[name].scheduler, {**SAMPLERS[name].options}
    options = {**betas(base), "num_train_timesteps": STEPS}
    if base.get("timestep_spacing") == "trailing":  # few-step models need exactly these timesteps
        own = {**own, "timestep_spacing": "trailing"}
    if zero_terminal_snr:
        own = {**own, _ZERO_SNR: True, "timestep_spacing": "trailing"}
    if steps_offset is not None:
        own = {**own, "steps_offset": steps_offset}
    return getattr(diffusers, kind)(**options, prediction_type=prediction_type, **own)


def _takes_zero_snr(name: str) -> bool:
    kind = getattr(diffusers, SAMPLERS[name].scheduler)
    return _ZERO_SNR in inspect.signature(kind.__init__).parameters
