"""SD1.x and SD2.x: one text encoder and a U-Net."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline, UNet2DConditionModel

from lora_adapters.train.data.cache_files import LatentFiles
from lora_adapters.train.models.family import TrainingFamily
from lora_adapters.train.models.text_encoding import Encoded, Reading

_NO_SAFETY_CHECKER = {"safety_checker": None, "feature_extractor": None}


class StableDiffusion(TrainingFamily):
    """SD1.x and SD2.x. Models that no other family recognises are assumed to belong to this one."""

    name = "sd"
    kinds: ClassVar[Mapping[str, Any]] = {"sd1": "SD1.x", "sd2": "SD2.x"}
    flags: ClassVar[Mapping[str, Any]] = {"v1": "sd1", "v2": "sd2"}
    denoiser, denoiser_title = "unet", "U-Net"
    tokenizers, text_encoders = ("tokenizer",), ("text_encoder",)
    pipeline_class, image_to_image_class = StableDiffusionPipeline, StableDiffusionImg2ImgPipeline
    pipeline_options: ClassVar[Mapping[str, Any]] = {**_NO_SAFETY_CHECKER, "requires_safety_checker": False}
    image_to_image_options: ClassVar[Mapping[str, Any]] = {"requires_safety_checker": False}
    checkpoint_options: ClassVar[Mapping[str, Any]] = _NO_SAFETY_CHECKER
    latent_files = LatentFiles("_sd.npz", unsized=".npz")

    def in_folder(self, index: Mapping[str, Any]) -> bool:
        return True

    def in_checkpoint(self, keys: Collection[str]) -> bool:
        return True

    def kind_of(self, pipeline: Any) -> str | None:
        if not is_unet_pipeline(pipeline) or getattr(pipeline, "text_encoder_2", None) is not None:
            return None
        return "sd2" if pipeline.unet.config.cross_attention_dim == 1024 else "sd1"

    def with_v2(self, kind: str, denoiser: Any) -> str | None:
        return None if kind == "sd1" and denoiser.config.cross_attention_dim == 768 else "sd2"

    def readings(self, clip_skip: int | None = None) -> tuple[Reading, ...]:
        """The last layer, or the n-th layer from the end with clip_skip, with the final normalisation."""
        return (Reading(clip_skip or None),)

    def to_cache(self, encoded: Encoded, widths: Sequence[int]) -> dict[str, torch.Tensor]:
        return {"hidden_state": encoded.hidden}

    def from_cache(self, cached: Mapping[str, torch.Tensor]) -> Encoded:
        return Encoded(cached["hidden_state"])

    def predict(
        self,
        denoiser: Any,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
        text: Encoded,
        conditions: torch.Tensor | None,
    ) -> torch.Tensor:
        return denoiser(noisy, timesteps, text.hidden, return_dict=False)[0]

    def metadata(self, kind: str, v_prediction: bool) -> dict[str, Any]:
        version = "sd_v2" if kind == "sd2" else "sd_v1"
        return {"ss_v2": kind == "sd2", "ss_base_model_version": f"{version}_v" if v_prediction else version}


def is_unet_pipeline(pipeline: Any) -> bool:
    """Whether a pipeline has Stable Diffusion's U-Net and a text encoder."""
    unet, text_encoder = (getattr(pipeline, name, None) for name in ("unet", "text_encoder"))
    return isinstance(unet, UNet2DConditionModel) and text_encoder is not None


SD = StableDiffusion()
