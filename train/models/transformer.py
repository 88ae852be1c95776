"""What the families of diffusion transformers have in common: tokens of 2x2 latents, flow matching."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from lora_adapters.convert.families.registry import by_name
from lora_adapters.train.models.family import TrainingFamily
from lora_adapters.train.models.noise_schedule import FLOW


class TransformerFamily(TrainingFamily):
    """A family whose denoiser is a transformer that predicts velocities.

    Attributes:
        transformer_class: diffusers' class of the denoiser.
    """

    transformer_class: ClassVar[Any]
    denoiser, denoiser_title = "transformer", "transformer"
    predictions = (FLOW,)
    pixel_step = 16
    draws = False

    def in_folder(self, index: Mapping[str, Any]) -> bool:
        return (index.get("transformer") or (None, None))[1] == self.transformer_class.__name__

    def in_checkpoint(self, keys: Collection[str]) -> bool:
        marks = by_name(self.name).marks.tensors
        return any(key.startswith(marks) for key in keys)

    def unread_layers(self, text_encoders: Sequence[Any], clip_skip: int | None) -> list[torch.nn.Module]:
        return []

    def sampler(self, name: str, prediction: str, zero_terminal_snr: bool, config: Mapping[str, Any]) -> Any:
        """The base model's own: Euler's steps along the flow."""
        return FlowMatchEulerDiscreteScheduler.from_config(dict(config))
