"""Families of transformers for image generation only, not for training.

Prompts are passed to diffusers' pipeline, which returns images; it also encodes text and handles latents.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar, NoReturn

import diffusers
import torch

from lora_adapters.train.errors import TrainingError
from lora_adapters.train.models.family import TrainingFamily
from lora_adapters.train.models.noise_schedule import FLOW
from lora_adapters.train.models.text_encoding import Encoded


class DrawnFamily(TrainingFamily):
    """A family that is identified by the class of its pipeline.

    Attributes:
        scale_argument: The pipeline's argument for the guidance scale.
    """

    scale_argument: ClassVar[str] = "guidance_scale"
    trained = False
    denoiser, denoiser_title = "transformer", "transformer"
    tokenizers, text_encoders = ("tokenizer",), ("text_encoder",)
    predictions = (FLOW,)
    pixel_step, side = 16, 1024
    image_to_image_class = None

    def in_folder(self, index: Mapping[str, Any]) -> bool:
        return index.get("_class_name") == self.pipeline_class.__name__

    def in_checkpoint(self, keys: Collection[str]) -> bool:
        return False  # checkpoint files of these families contain the transformer only

    def kind_of(self, pipeline: Any) -> str | None:
        return self.name if isinstance(pipeline, self.pipeline_class) else None

    def image_arguments(self, prompts: Sequence[str], negative: Sequence[str], scale: float) -> dict[str, Any]:
        return {"prompt": list(prompts), "negative_prompt": list(negative), self.scale_argument: scale}

    # --- methods for training, which is not supported -----------------------------------------------------------------

    def to_cache(self, encoded: Encoded, widths: Sequence[int]) -> NoReturn:
        self._refuse()

    def from_cache(self, cached: Mapping[str, torch.Tensor]) -> NoReturn:
        self._refuse()

    def predict(
        self,
        denoiser: Any,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
        text: Encoded,
        conditions: torch.Tensor | None,
    ) -> NoReturn:
        self._refuse()

    def metadata(self, kind: str, v_prediction: bool) -> NoReturn:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise TrainingError(f"{self.title} is supported for image generation, not for training")


class Chroma(DrawnFamily):
    name, guidance = "chroma", 5.0
    kinds: ClassVar[Mapping[str, str]] = {"chroma": "Chroma"}
    pipeline_class = getattr(diffusers, "ChromaPipeline", None)


class Lumina2(DrawnFamily):
    name, guidance = "lumina2", 4.0
    kinds: ClassVar[Mapping[str, str]] = {"lumina2": "Lumina2"}
    pipeline_class = getattr(diffusers, "Lumina2Pipeline", None)


class QwenImage(DrawnFamily):
    name, guidance, scale_argument = "qwen_image", 4.0, "true_cfg_scale"
    kinds: ClassVar[Mapping[str, str]] = {"qwen_image": "Qwen-Image"}
    pipeline_class = getattr(diffusers, "QwenImagePipeline", None)


class ZImage(DrawnFamily):
    name, guidance = "zimage", 5.0
    kinds: ClassVar[Mapping[str, str]] = {"zimage": "Z-Image"}
    pipeline_class = getattr(diffusers, "ZImagePipeline", None)


# The families whose pipeline exists in the installed version of diffusers.
DRAWN: dict[str, DrawnFamily] = {
    family.name: family() for family in (Chroma, Lumina2, QwenImage, ZImage) if family.pipeline_class is not None
}
