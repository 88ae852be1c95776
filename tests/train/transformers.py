"""Tiny pipelines of diffusion transformers with all parts, as folders: CLIP and T5 text encoders."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPTextModel, CLIPTextModelWithProjection, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from .conftest import WORDS, text_config, tiny_tokenizer

CHANNELS = 4


def t5_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of whole words with an end token and padding, like T5's."""
    vocabulary = {word: number for number, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    tokens = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=16, **tokens)


def t5(width: int = 24) -> T5EncoderModel:
    config = T5Config(vocab_size=16, d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
                      feed_forward_proj="gated-gelu")  # fmt: skip
    return T5EncoderModel(config)


def vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
        sample_size=64,
        latent_channels=CHANNELS,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        layers_per_block=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def build_flux(folder: Path, guidance: bool = True) -> Path:
    """Flux.1's layout with two double and two single blocks; with `guidance` that of Flux.1 dev."""
    torch.manual_seed(0)
    clip = tiny_tokenizer()
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * CHANNELS,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=32,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 6, 6),
    )
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae(),
        text_encoder=CLIPTextModel(text_config(clip)),
        tokenizer=clip,
        text_encoder_2=t5(),
        tokenizer_2=t5_tokenizer(),
        transformer=transformer,
    )
    pipe.save_pretrained(folder)
    return folder


def build_sd3(folder: Path, dual: tuple[int, ...] = ()) -> Path:
    """SD3's layout with two joint blocks and three text encoders; with `dual` attention that of SD3.5 medium."""
    torch.manual_seed(0)
    clip = tiny_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=72,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        pos_embed_max_size=8,
        dual_attention_layers=dual,
        qk_norm="rms_norm" if dual else None,
    )
    texts = [CLIPTextModelWithProjection(text_config(clip, projection_dim=32)) for _ in range(2)]
    pipe = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(),
        text_encoder=texts[0],
        tokenizer=clip,
        text_encoder_2=texts[1],
        tokenizer_2=clip,
        text_encoder_3=t5(72),
        tokenizer_3=t5_tokenizer(),
    )
    pipe.save_pretrained(folder)
    return folder
