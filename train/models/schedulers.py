"""Samplers by kohya's names: diffusers' schedulers over Stable Diffusion's training schedule."""

import inspect
from collections.abc import Mapping
from typing import Any

import diffusers

from lora_adapters.train.errors import TrainingError
from lora_adapters.train.models.noise_schedule import STEPS, betas, ends_in_noise

_CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True, "steps_offset": 1}),
    "lms": ("LMSDiscreteScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm_2": ("KDPM2DiscreteScheduler", {}),
    "dpm_2_a": ("KDPM2AncestralDiscreteScheduler", {}),
    "dpmsolver": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
    "dpmsolver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpmsingle": ("DPMSolverSinglestepScheduler", {}),
}
SAMPLERS = [*_CLASSES, "k_lms", "k_euler", "k_euler_a", "k_dpm_2", "k_dpm_2_a"]
_ZERO_SNR = "rescale_betas_zero_snr"


def check_sampler(name: str, zero_terminal_snr: bool = False) -> None:
    """Raise TrainingError for a name that is no sampler, or one that cannot start from pure noise."""
    if name not in SAMPLERS:
        raise TrainingError(f"{name} is no sampler; {', '.join(SAMPLERS)} are")
    if zero_terminal_snr and not _takes_zero_snr(name):
        able = ", ".join(one for one in _CLASSES if _takes_zero_snr(one))
        raise TrainingError(f"the sampler {name} cannot do --zero_terminal_snr; {able} can")


def sampler(
    name: str,
    prediction_type: str,
    zero_terminal_snr: bool = False,
    steps_offset: int | None = None,
    base: Mapping[str, Any] | None = None,
) -> Any:
    """diffusers' scheduler of that name (see SAMPLERS), with the training schedule's betas.

    steps_offset: in place of the sampler's own. base: the base model's scheduler config, whose betas, zero terminal SNR
    and trailing timesteps are kept; without it they are Stable Diffusion's.
    """
    base = base or {}
    zero_terminal_snr = zero_terminal_snr or ends_in_noise(base)
    check_sampler(name, zero_terminal_snr)
    kind, own = _CLASSES[_plain(name)]
    options = {**betas(base), "num_train_timesteps": STEPS}
    if base.get("timestep_spacing") == "trailing":  # models of few steps: any other spacing misses their steps
        own = {**own, "timestep_spacing": "trailing"}
    if zero_terminal_snr:
        own = {**own, _ZERO_SNR: True, "timestep_spacing": "trailing"}
    if steps_offset is not None:
        own = {**own, "steps_offset": steps_offset}
    return getattr(diffusers, kind)(**options, prediction_type=prediction_type, **own)


def _plain(name: str) -> str:
    return name.removeprefix("k_")


def _takes_zero_snr(name: str) -> bool:
    kind = getattr(diffusers, _CLASSES[_plain(name)][0])
    return _ZERO_SNR in inspect.signature(kind.__init__).parameters
