"""--offload: keeps models in CPU memory until they are used, with diffusers' offloading."""

from typing import Any

import torch

from lora_adapters.train.errors import OptionError, TrainingError
from lora_adapters.train.generation.options import GenerateSettings


def check_offload(settings: GenerateSettings, device: torch.device) -> None:
    """Raise OptionError if --offload contradicts other options, TrainingError on a CPU."""
    if settings.offload is None:
        return
    if settings.network_pre_calc:
        raise OptionError("--offload cannot be combined with --network_pre_calc, which changes weights between images")
    if device.type == "cpu":
        raise TrainingError("--offload needs a cuda or mps device; leave it out")


def offload(pipe: Any, how: str, device: torch.device) -> None:
    """Turn on diffusers' CPU offloading. The models must be on the CPU, with their adapters, if any.

    Args:
        pipe: A diffusers pipeline.
        how: "model" moves each model to the device while it runs, "sequential" each layer.
        device: The device to run on.
    """
    if how == "model":
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.enable_sequential_cpu_offload(device=device)
