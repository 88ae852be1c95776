"""The base class of diffusion transformer families: 2x2 patches of latents, flow matching."""

from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from lora_adapters.convert.families.registry import by_name
from lora_adapters.train.models.family import TrainingFamily
from lora_adapters.train.models.noise_schedule import FLOW
from lora_adapters.train.models.part_files import TextPart


class TransformerFamily(TrainingFamily):
    """A family whose denoiser is a transformer that predicts velocities.

    Attributes:
        transformer_class: The denoiser's class in diffusers.
        text_parts: Component -> how to load that text encoder from a file.
        vae_config: The config of the released models' VAE.
    """

    transformer_class: ClassVar[Any]
    text_parts: ClassVar[Mapping[str, TextPart]]
    vae_config: ClassVar[Mapping[str, Any]]
    denoiser, denoiser_title = "transformer", "transformer"
    predictions = (FLOW,)
    pixel_step, sample_size = 16, 128

    def in_folder(self, index: Mapping[str, Any]) -> bool:
        return (index.get("transformer") or (None, None))[1] == self.transformer_class.__name__

    def in_checkpoint(self, keys: Collection[str]) -> bool:
        marks = by_name(self.name).marks.tensors
        return any(key.startswith(marks) for key in keys)

    def check_config(self, config: Mapping[str, Any]) -> None:
        """Raise TrainingError if a transformer with this config is an unsupported variant."""

    @abstractmethod
    def denoiser_config(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """Derive the config of a transformer from the shapes of its tensors.

        Args:
            shapes: Name in the original code -> shape.

        Returns:
            The config for diffusers' model.

        Raises:
            KeyError: A tensor is missing; the argument is its name.
            TrainingError: The config cannot be derived from the shapes, or the variant is not supported.
        """

    @abstractmethod
    def scheduler_config(self, denoiser: Any) -> dict[str, Any]:
        """The FlowMatchEulerDiscreteScheduler arguments of the released model."""

    def blocks_to_swap(self, count: int) -> dict[str, int]:
        return {"transformer_blocks": count}

    def unread_layers(self, text_encoders: Sequence[Any], clip_skip: int | None) -> list[torch.nn.Module]:
        return []


_KL = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "force_upcast": True,
    "sample_size": 1024,
}
_CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "projection_dim": 768}
_CLIP_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
_T5_XXL = {
    "d_model": 4096,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "is_encoder_decoder": False,
}


def vae_config(scale: float, shift: float) -> dict[str, Any]:
    """The config of a VAE with 16 latent channels and these scaling and shift factors."""
    return {**_KL, "scaling_factor": scale, "shift_factor": shift}


def clip_l(model: Any) -> TextPart:
    """CLIP-L, loaded as the transformers class `model`."""
    return TextPart("clip_l", "CLIP-L", model, _CLIP_L, "openai/clip-vit-large-patch14")


def clip_g() -> TextPart:
    """CLIP-G, whose padding token has id 0."""
    repository, padding = "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k", {"pad_token": "!"}
    return TextPart("clip_g", "CLIP-G", CLIPTextModelWithProjection, _CLIP_G, repository, padding)


def t5_xxl(optional: bool = False) -> TextPart:
    """The encoder of T5-XXL, version 1.1."""
    return TextPart("t5xxl", "T5-XXL", T5EncoderModel, _T5_XXL, "google/t5-v1_1-xxl", optional=optional)


def count(shapes: Collection[str], stack: str) -> int:
    """The number of blocks in a stack, derived from tensor names."""
    return 1 + max((int(name.split(".")[1]) for name in shapes if name.startswith(f"{stack}.")), default=-1)
