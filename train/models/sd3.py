"""SD3 and SD3.5: CLIP-L, CLIP-G and T5, a transformer over latents, flow matching with a loss on images."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import (
    SD3Transformer2DModel,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3Pipeline,
)
from transformers import CLIPTextModelWithProjection

from lora_adapters.convert.families.registry import by_name
from lora_adapters.train.data.cache_files import LatentFiles
from lora_adapters.train.models.text_encoding import Encoded, Tokens
from lora_adapters.train.models.transformer import TransformerFamily, clip_g, clip_l, count, t5_xxl, vae_config
from lora_adapters.train.models.transformer_text import AbsentEncoder, clip_tokens, t5_states, t5_tokens
from lora_adapters.train.moving import computing_device

_CLIP_TOKENS = 77
_HEAD = 64  # size of an attention head, if the file has no query norm to tell it
_T5_LENGTH = 256
_KINDS = ("sd3_medium", "sd35_medium", "sd35_large")  # in the order of the family's versions

_TRANSFORMER: Any = SD3Transformer2DModel  # Any: type checkers see diffusers' dummy class for missing packages


class StableDiffusion3(TransformerFamily):
    """SD3 medium, SD3.5 medium and SD3.5 large, with T5 or without."""

    name = "sd3"
    kinds: ClassVar[Mapping[str, Any]] = dict(
        zip(_KINDS, (version.title for version in by_name("sd3").versions), strict=True)
    )
    transformer_class = SD3Transformer2DModel
    tokenizers = ("tokenizer", "tokenizer_2", "tokenizer_3")
    text_encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
    frozen_text_encoders = ("text_encoder_3",)
    pipeline_class, image_to_image_class = StableDiffusion3Pipeline, StableDiffusion3Img2ImgPipeline
    latent_files = LatentFiles("_sd3.npz")
    text_ending = "_sd3_te.npz"
    image_loss = True
    rank_args: ClassVar[Mapping[str, str]] = {
        "context_attn_dim": r"transformer_blocks\.\d+\.attn\.(add_[qkv]_proj|to_add_out)",
        "context_mlp_dim": r"transformer_blocks\.\d+\.ff_context\..*",
        "context_mod_dim": r"transformer_blocks\.\d+\.norm1_context\.linear",
        "x_attn_dim": r"transformer_blocks\.\d+\.attn2?\.to_(q|k|v|out\.0)",
        "x_mlp_dim": r"transformer_blocks\.\d+\.ff\..*",
        "x_mod_dim": r"transformer_blocks\.\d+\.norm1\.linear",
    }
    block_args: ClassVar[Mapping[str, str]] = {"train_block_indices": "transformer_blocks"}
    unused_options = (
        "timestep_sampling", "sigmoid_scale", "discrete_flow_shift", "model_prediction_type", "guidance_scale",
    )  # fmt: skip

    text_parts: ClassVar[Mapping[str, Any]] = {
        "text_encoder": clip_l(CLIPTextModelWithProjection),
        "text_encoder_2": clip_g(),
        "text_encoder_3": t5_xxl(optional=True),
    }
    vae_config: ClassVar[Mapping[str, Any]] = vae_config(1.5305, 0.0609)

    def denoiser_config(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        width, channels, patch, _ = shapes["x_embedder.proj.weight"]
        (head,) = shapes.get("joint_blocks.0.x_block.attn.ln_q.weight", (_HEAD,))
        blocks = count(shapes, "joint_blocks")
        return {
            "sample_size": 128,
            "patch_size": patch,
            "in_channels": channels,
            "out_channels": shapes["final_layer.linear.weight"][0] // patch**2,
            "num_layers": blocks,
            "attention_head_dim": head,
            "num_attention_heads": width // head,
            "joint_attention_dim": shapes["context_embedder.weight"][1],
            "caption_projection_dim": shapes["context_embedder.weight"][0],
            "pooled_projection_dim": shapes["y_embedder.mlp.0.weight"][1],
            "pos_embed_max_size": math.isqrt(shapes["pos_embed"][1]),
            "dual_attention_layers": tuple(
                number for number in range(blocks) if f"joint_blocks.{number}.x_block.attn2.qkv.weight" in shapes
            ),
            "qk_norm": "rms_norm" if "joint_blocks.0.x_block.attn.ln_q.weight" in shapes else None,
        }

    def scheduler_config(self, denoiser: Any) -> dict[str, Any]:
        return {"shift": 3.0}

    def kind_of(self, pipeline: Any) -> str | None:
        model: Any = getattr(pipeline, "transformer", None)
        if not isinstance(model, _TRANSFORMER):
            return None
        paths = {path for path, _ in model.named_modules()}
        first, *others = zip(_KINDS, by_name(self.name).versions, strict=True)
        return next((kind for kind, version in others if version.mark in paths), first[0])

    def absent_text_encoder(self, component: str, pipeline: Any) -> torch.nn.Module | None:
        """T5 is optional."""
        absent = component == self.text_encoders[-1]
        return AbsentEncoder(pipeline.transformer.config.joint_attention_dim) if absent else None

    # --- text -------------------------------------------------------------------------------------------------------

    def tokenize(self, models: Any, captions: list[str], chunks: int = 1, weighted: bool = False) -> list[Tokens]:
        """77 tokens for each CLIP, and T5's tokens. `chunks` and `weighted` have no effect."""
        *clips, t5 = models.tokenizers
        t5 = None if isinstance(models.text_encoders[-1], AbsentEncoder) else t5
        length = models.choices.t5_length or _T5_LENGTH
        tokens = [clip_tokens(tokenizer, captions) for tokenizer in clips]
        return [*tokens, t5_tokens(t5, captions, length, models.choices.t5_mask)]

    def encode(
        self,
        tokens: Sequence[Tokens],
        text_encoders: Sequence[Any],
        clip_skip: int | None = None,
        keep_mean: str = "none",
    ) -> Encoded:
        """The penultimate layers of both CLIPs, concatenated, then T5's states; and the CLIPs' pooled projections."""
        *clips, t5 = text_encoders
        states, pooled = [], []
        for own, encoder in zip(tokens, clips, strict=False):
            output = encoder(own.ids[:, 0].to(computing_device(encoder)), output_hidden_states=True)
            states.append(output.hidden_states[-2])
            pooled.append(output.text_embeds)
        t5_out, mask = t5_states(t5, tokens[-1])
        return Encoded(_below(torch.cat(states, dim=-1), t5_out), torch.cat(pooled, dim=-1), mask)

    def to_cache(self, encoded: Encoded, widths: Sequence[int]) -> dict[str, torch.Tensor]:
        assert encoded.pooled is not None
        n, tokens = len(encoded.hidden), encoded.hidden.shape[1] - _CLIP_TOKENS
        seen = torch.ones(n, _CLIP_TOKENS)
        return {
            "lg_out": encoded.hidden[:, :_CLIP_TOKENS, : sum(widths[:-1])],
            "lg_pooled": encoded.pooled,
            "t5_out": encoded.hidden[:, _CLIP_TOKENS:],
            "clip_l_attn_mask": seen,
            "clip_g_attn_mask": seen,
            "t5_attn_mask": torch.ones(n, tokens) if encoded.mask is None else encoded.mask,
            "apply_lg_attn_mask": torch.zeros(n),
            "apply_t5_attn_mask": torch.full((n,), encoded.mask is not None),
        }

    def from_cache(self, cached: Mapping[str, torch.Tensor]) -> Encoded:
        return Encoded(_below(cached["lg_out"], cached["t5_out"]), cached["lg_pooled"])

    # --- the denoiser -----------------------------------------------------------------------------------------------

    def predict(
        self,
        denoiser: Any,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
        text: Encoded,
        conditions: torch.Tensor | None,
    ) -> torch.Tensor:
        """Predict the velocity. The T5 mask is not used here, only in T5 itself, as in kohya's trainer."""
        return denoiser(
            hidden_states=noisy,
            encoder_hidden_states=text.hidden,
            pooled_projections=text.pooled,
            timestep=timesteps.float(),
            return_dict=False,
        )[0]

    # --- the pipeline -----------------------------------------------------------------------------------------------

    def prompt_arguments(self, positive: Encoded, negative: Encoded) -> dict[str, Any]:
        pooled = {"pooled_prompt_embeds": positive.pooled, "negative_pooled_prompt_embeds": negative.pooled}
        return super().prompt_arguments(positive, negative) | pooled

    def metadata(self, kind: str, v_prediction: bool) -> dict[str, Any]:
        version = by_name(self.name).versions[_KINDS.index(kind)]
        return {"ss_v2": False, "ss_base_model_version": version.value}


def _below(clip: torch.Tensor, t5: torch.Tensor) -> torch.Tensor:
    """CLIP's states (n, 77, width), padded with zeros to T5's width, followed by T5's states (n, length, width)."""
    return torch.cat([F.pad(clip, (0, t5.shape[-1] - clip.shape[-1])), t5], dim=1)


SD3 = StableDiffusion3()
