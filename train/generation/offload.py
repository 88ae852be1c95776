"""--offload: models wait in main memory until they compute, by diffusers' own means."""

from typing import Any

import torch

from lora_adapters.train.errors import OptionError, TrainingError
from lora_adapters.train.generation.options import GenerateSettings


def check_offload(settings: GenerateSettings, device: torch.device) -> None:
    """Raise OptionError for what --offload does not go with, and TrainingError where there is nothing to bring to."""
    if settings.offload is None:
        return
    if settings.network_pre_calc:
        raise OptionError("--offload does not go with --network_pre_calc, which changes weights between the images")
    if device.type == "cpu":
        raise TrainingError("--offload needs a cuda or mps device: on a CPU all is in main memory; leave it out")


def offload(pipe: Any, how: str, device: torch.device) -> None:
    """Let the pipeline's models wait in main memory, where they are. Call it with the adapters on them, if any.

    Args:
        pipe: diffusers' pipeline.
        how: "model": each model is on the device while it computes; "sequential": each layer.
        device: Where they compute.
    """
    if how == "model":
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.enable_sequential_cpu_offload(device=device)
