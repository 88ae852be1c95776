"""The table of samplers by kohya's names, used by options, pipelines and saved generation settings."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Sampler:
    """One sampler.

    Args:
        scheduler: The class in diffusers.
        title: The name in AUTOMATIC1111's web UI, for settings saved in images.
        options: Arguments of the class in addition to the noise schedule.
    """

    scheduler: str
    title: str
    options: Mapping[str, Any] = field(default_factory=dict)


_MULTISTEP = "DPMSolverMultistepScheduler"
_TABLE = {
    "ddim": Sampler("DDIMScheduler", "DDIM", {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}),
    "pndm": Sampler("PNDMScheduler", "PLMS", {"skip_prk_steps": True, "steps_offset": 1}),
    "lms": Sampler("LMSDiscreteScheduler", "LMS"),
    "euler": Sampler("EulerDiscreteScheduler", "Euler"),
    "euler_a": Sampler("EulerAncestralDiscreteScheduler", "Euler a"),
    "heun": Sampler("HeunDiscreteScheduler", "Heun"),
    "dpm_2": Sampler("KDPM2DiscreteScheduler", "DPM2"),
    "dpm_2_a": Sampler("KDPM2AncestralDiscreteScheduler", "DPM2 a"),
    "dpmsolver": Sampler(
        _MULTISTEP, "DPM-Solver 2M", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}
    ),
    "dpmsolver++": Sampler(_MULTISTEP, "DPM++ 2M", {"algorithm_type": "dpmsolver++"}),
    "dpmsingle": Sampler("DPMSolverSinglestepScheduler", "DPM++ 2S"),
}
_ALIASES = ("lms", "euler", "euler_a", "dpm_2", "dpm_2_a")  # also known with the prefix k_

SAMPLERS: dict[str, Sampler] = {**_TABLE, **{f"k_{name}": _TABLE[name] for name in _ALIASES}}
