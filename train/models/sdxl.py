"""SDXL: two text encoders, and a U-Net that is conditioned on the pooled text and on sizes."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline

from lora_adapters.train.data.cache_files import LatentFiles
from lora_adapters.train.models.family import SizeConditions, TrainingFamily
from lora_adapters.train.models.sd import is_unet_pipeline
from lora_adapters.train.models.text_encoding import Encoded, Reading

_LAYER = 2  # the text encoders' layer, counted from the end, that the U-Net uses, without final normalisation


class StableDiffusionXL(TrainingFamily):
    """SDXL 1.0 and models fine-tuned from it."""

    name = "sdxl"
    kinds: ClassVar[Mapping[str, Any]] = {"sdxl": "SDXL"}
    flags: ClassVar[Mapping[str, Any]] = {"sdxl": "sdxl"}
    denoiser, denoiser_title = "unet", "U-Net"
    tokenizers, text_encoders = ("tokenizer", "tokenizer_2"), ("text_encoder", "text_encoder_2")
    pipeline_class, image_to_image_class = StableDiffusionXLPipeline, StableDiffusionXLImg2ImgPipeline
    image_to_image_options: ClassVar[Mapping[str, Any]] = {"add_watermarker": False}
    latent_files = LatentFiles("_sdxl.npz")
    fixed_clip_skip = _LAYER
    has_sizes = True

    def in_folder(self, index: Mapping[str, Any]) -> bool:
        return "text_encoder_2" in index

    def in_checkpoint(self, keys: Collection[str]) -> bool:
        return any(key.startswith("conditioner.embedders.1.") for key in keys)

    def kind_of(self, pipeline: Any) -> str | None:
        two = is_unet_pipeline(pipeline) and getattr(pipeline, "text_encoder_2", None) is not None
        return "sdxl" if two else None

    def readings(self, clip_skip: int | None = None) -> tuple[Reading, ...]:
        """The penultimate layers of both text encoders, and the second one's pooled projection of the end token."""
        return Reading(_LAYER, normalised=False), Reading(_LAYER, normalised=False, pooled=True)

    def to_cache(self, encoded: Encoded, widths: Sequence[int]) -> dict[str, torch.Tensor]:
        assert encoded.pooled is not None
        first, second = encoded.hidden.split(list(widths), dim=-1)
        return {"hidden_state1": first, "hidden_state2": second, "pool2": encoded.pooled}

    def from_cache(self, cached: Mapping[str, torch.Tensor]) -> Encoded:
        return Encoded(torch.cat([cached["hidden_state1"], cached["hidden_state2"]], dim=-1), cached["pool2"])

    def conditions(self, batch: Any, models: Any) -> torch.Tensor | None:
        """(n, 6): original height and width, crop top and left, target height and width, in pixels."""
        parts = [batch.original_sizes, batch.crop_top_lefts, batch.target_sizes]
        return torch.cat([torch.as_tensor(part).float() for part in parts], dim=1)

    def predict(
        self,
        denoiser: Any,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
        text: Encoded,
        conditions: torch.Tensor | None,
    ) -> torch.Tensor:
        added = {"text_embeds": text.pooled, "time_ids": conditions}
        return denoiser(noisy, timesteps, text.hidden, added_cond_kwargs=added, return_dict=False)[0]

    def prompt_arguments(self, positive: Encoded, negative: Encoded) -> dict[str, Any]:
        pooled = {"pooled_prompt_embeds": positive.pooled, "negative_pooled_prompt_embeds": negative.pooled}
        return super().prompt_arguments(positive, negative) | pooled

    def size_arguments(self, sizes: SizeConditions) -> dict[str, Any]:
        return {
            "original_size": sizes.original,
            "negative_original_size": sizes.negative_original,
            "crops_coords_top_left": sizes.crop,
            "negative_crops_coords_top_left": sizes.crop,
            "target_size": sizes.target,
            "negative_target_size": sizes.target,
        }

    def metadata(self, kind: str, v_prediction: bool) -> dict[str, Any]:
        return {"ss_v2": False, "ss_base_model_version": "sdxl_base_v1-0"}


SDXL = StableDiffusionXL()
