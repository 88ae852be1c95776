"""Flux.1: CLIP-L's pooled output and T5's hidden states, a transformer over 2x2 patches of latents, flow matching."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import FluxImg2ImgPipeline, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextModel

from lora_adapters.convert.families.registry import by_name
from lora_adapters.train.data.cache_files import LatentFiles
from lora_adapters.train.errors import TrainingError
from lora_adapters.train.models.text_encoding import Encoded, Tokens
from lora_adapters.train.models.transformer import TransformerFamily, clip_l, count, t5_xxl, vae_config
from lora_adapters.train.models.transformer_text import clip_tokens, t5_states, t5_tokens
from lora_adapters.train.moving import computing_device

_AXES = (16, 56, 56)  # sizes of the rotary position embedding's axes in an attention head
_T5_LENGTH = {"flux_dev": 512, "flux_schnell": 256}

_TRANSFORMER: Any = FluxTransformer2DModel  # Any: type checkers see diffusers' dummy class for missing packages


class Flux1(TransformerFamily):
    """Flux.1 dev, with a guidance embedding, and Flux.1 schnell, without one."""

    name = "flux"
    kinds: ClassVar[Mapping[str, Any]] = {"flux_dev": "Flux.1 dev", "flux_schnell": "Flux.1 schnell"}
    transformer_class = FluxTransformer2DModel
    tokenizers, text_encoders = ("tokenizer", "tokenizer_2"), ("text_encoder", "text_encoder_2")
    frozen_text_encoders = ("text_encoder_2",)
    pipeline_class, image_to_image_class = FluxPipeline, FluxImg2ImgPipeline
    latent_files = LatentFiles("_flux.npz", normalised=True)
    text_ending = "_flux_te.npz"
    guidance = 3.5
    reads_negative_prompt = False
    unused_options = ("training_shift",)
    rank_args: ClassVar[Mapping[str, str]] = {
        "img_attn_dim": r"transformer_blocks\.\d+\.attn\.to_(q|k|v|out\.0)",
        "txt_attn_dim": r"transformer_blocks\.\d+\.attn\.(add_[qkv]_proj|to_add_out)",
        "img_mlp_dim": r"transformer_blocks\.\d+\.ff\..*",
        "txt_mlp_dim": r"transformer_blocks\.\d+\.ff_context\..*",
        "img_mod_dim": r"transformer_blocks\.\d+\.norm1\.linear",
        "txt_mod_dim": r"transformer_blocks\.\d+\.norm1_context\.linear",
        "single_dim": r"single_transformer_blocks\.\d+\.(attn\..*|proj_mlp|proj_out)",
        "single_mod_dim": r"single_transformer_blocks\.\d+\.norm\.linear",
    }
    block_args: ClassVar[Mapping[str, str]] = {
        "train_double_block_indices": "transformer_blocks",
        "train_single_block_indices": "single_transformer_blocks",
    }

    text_parts: ClassVar[Mapping[str, Any]] = {"text_encoder": clip_l(CLIPTextModel), "text_encoder_2": t5_xxl()}
    vae_config: ClassVar[Mapping[str, Any]] = vae_config(0.3611, 0.1159)

    def check_config(self, config: Mapping[str, Any]) -> None:
        channels = config["in_channels"]
        _check_channels(channels, config.get("out_channels") or channels)

    def denoiser_config(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        width, channels = shapes["img_in.weight"]
        (head,) = shapes["double_blocks.0.img_attn.norm.query_norm.scale"]
        latent = shapes["final_layer.linear.weight"][0]
        _check_channels(channels, latent)
        if head != sum(_AXES):
            raise TrainingError(
                f"a Flux.1 with attention head size {head}: give --model_config=<Diffusers folder of that model>"
            )
        return {
            "patch_size": 1,
            "in_channels": channels,
            "num_layers": count(shapes, "double_blocks"),
            "num_single_layers": count(shapes, "single_blocks"),
            "attention_head_dim": head,
            "num_attention_heads": width // head,
            "joint_attention_dim": shapes["txt_in.weight"][1],
            "pooled_projection_dim": shapes["vector_in.in_layer.weight"][1],
            "guidance_embeds": "guidance_in.in_layer.weight" in shapes,
            "axes_dims_rope": _AXES,
        }

    def blocks_to_swap(self, count: int) -> dict[str, int]:
        """Half of `count` are double blocks; for each of the rest two single blocks, which are half as large."""
        double = count // 2
        return {"transformer_blocks": double, "single_transformer_blocks": 2 * (count - double)}

    def scheduler_config(self, denoiser: Any) -> dict[str, Any]:
        dev = bool(denoiser.config.guidance_embeds)
        return {"shift": 3.0 if dev else 1.0, "use_dynamic_shifting": dev}

    def kind_of(self, pipeline: Any) -> str | None:
        model: Any = getattr(pipeline, "transformer", None)
        if not isinstance(model, _TRANSFORMER) or pipeline.vae is None:
            return None
        if model.config.in_channels != 4 * pipeline.vae.config.latent_channels:
            return None  # Fill and Control have images as additional inputs
        return "flux_dev" if model.config.guidance_embeds else "flux_schnell"

    # --- text -------------------------------------------------------------------------------------------------------

    def tokenize(self, models: Any, captions: list[str], chunks: int = 1, weighted: bool = False) -> list[Tokens]:
        """CLIP's 77 tokens, and T5's tokens. `chunks` and `weighted` have no effect."""
        clip, t5 = models.tokenizers
        length = models.choices.t5_length or _T5_LENGTH[models.kind]
        return [clip_tokens(clip, captions), t5_tokens(t5, captions, length, models.choices.t5_mask)]

    def encode(
        self,
        tokens: Sequence[Tokens],
        text_encoders: Sequence[Any],
        clip_skip: int | None = None,
        keep_mean: str = "none",
    ) -> Encoded:
        """T5's hidden states, and CLIP's pooled output."""
        clip, t5 = text_encoders
        pooled = clip(tokens[0].ids[:, 0].to(computing_device(clip))).pooler_output
        states, mask = t5_states(t5, tokens[1])
        return Encoded(states, pooled, mask)

    def to_cache(self, encoded: Encoded, widths: Sequence[int]) -> dict[str, torch.Tensor]:
        assert encoded.pooled is not None
        n, tokens = encoded.hidden.shape[:2]
        mask = torch.ones(n, tokens) if encoded.mask is None else encoded.mask
        return {
            "l_pooled": encoded.pooled,
            "t5_out": encoded.hidden,
            "txt_ids": torch.zeros(n, tokens, 3),
            "t5_attn_mask": mask,
            "apply_t5_attn_mask": torch.full((n,), encoded.mask is not None),
        }

    def from_cache(self, cached: Mapping[str, torch.Tensor]) -> Encoded:
        mask = cached["t5_attn_mask"] if bool(cached["apply_t5_attn_mask"].all()) else None
        return Encoded(cached["t5_out"], cached["l_pooled"], mask)

    # --- the denoiser -----------------------------------------------------------------------------------------------

    def conditions(self, batch: Any, models: Any) -> torch.Tensor | None:
        """The guidance scale (n,) for models with a guidance embedding, else None."""
        if not models.denoiser.config.guidance_embeds:
            return None
        return torch.full((len(batch.captions),), float(models.choices.guidance))

    def predict(
        self,
        denoiser: Any,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
        text: Encoded,
        conditions: torch.Tensor | None,
    ) -> torch.Tensor:
        height, width = noisy.shape[2:]
        attention = {} if text.mask is None else {"attention_mask": _attention(text.mask, height * width // 4)}
        predicted = denoiser(
            hidden_states=packed(noisy),
            encoder_hidden_states=text.hidden,
            pooled_projections=text.pooled,
            timestep=timesteps.float() / 1000,
            img_ids=image_ids(height // 2, width // 2, noisy.device),
            txt_ids=torch.zeros(text.hidden.shape[1], 3, device=noisy.device),
            guidance=conditions,
            joint_attention_kwargs=attention,
            return_dict=False,
        )[0]
        return unpacked(predicted, height, width)

    # --- the pipeline -----------------------------------------------------------------------------------------------

    def prompt_arguments(self, positive: Encoded, negative: Encoded) -> dict[str, Any]:
        return {"prompt_embeds": positive.hidden, "pooled_prompt_embeds": positive.pooled}

    def noise_argument(self, noise: torch.Tensor) -> torch.Tensor:
        return packed(noise)

    def drawn_latents(self, drawn: torch.Tensor, height: int, width: int) -> torch.Tensor:
        return unpacked(drawn, height, width)

    def metadata(self, kind: str, v_prediction: bool) -> dict[str, Any]:
        return {"ss_v2": False, "ss_base_model_version": by_name(self.name).stated}


def _check_channels(read: int, predicted: int) -> None:
    if read != predicted:
        raise TrainingError(
            f"a Flux.1 with {read} input and {predicted} output channels (Fill, Control) is not supported: it needs "
            "input images, which the data does not have"
        )


def packed(latents: torch.Tensor) -> torch.Tensor:
    """Pack latents (n, channels, h, w) into tokens of 2x2 patches: (n, h/2 · w/2, 4 · channels)."""
    n, channels, height, width = latents.shape
    tokens = latents.view(n, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return tokens.reshape(n, height * width // 4, 4 * channels)


def unpacked(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The reverse of `packed`: tokens (n, h/2 · w/2, 4 · channels) to latents (n, channels, h, w)."""
    n, _, size = tokens.shape
    latents = tokens.view(n, height // 2, width // 2, size // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return latents.reshape(n, size // 4, height, width)


def image_ids(rows: int, columns: int, device: Any) -> torch.Tensor:
    """The position of each image token: (rows · columns, 3) of (0, row, column)."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], dim=-1).view(-1, 3).float().to(device)


def _attention(mask: torch.Tensor, tokens: int) -> torch.Tensor:
    """The attention mask (n, 1, 1, text and image tokens): image tokens are always attended to (True)."""
    image = torch.ones(len(mask), tokens, dtype=torch.bool, device=mask.device)
    return torch.cat([mask.bool(), image], dim=1)[:, None, None]


FLUX = Flux1()
