"""Tiny pipelines that are drawn with and not trained, as folders."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    ChromaPipeline,
    ChromaTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from .transformers import CHANNELS, t5, t5_tokenizer, vae


def build_chroma(folder: Path) -> Path:
    """Chroma's layout: two double blocks, two single ones, T5 alone."""
    torch.manual_seed(0)
    transformer = ChromaTransformer2DModel(
        patch_size=1,
        in_channels=4 * CHANNELS,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=(4, 6, 6),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    ChromaPipeline(scheduler, vae(), t5(), t5_tokenizer(), transformer).save_pretrained(folder)
    return folder


def build_qwen_image(folder: Path) -> Path:
    """Qwen-Image's layout: two blocks, a VAE of images in time, Qwen2.5-VL."""
    torch.manual_seed(0)
    own_vae = AutoencoderKLQwenImage(
        base_dim=24,
        z_dim=4,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    heads = {"hidden_size": 16, "intermediate_size": 16}
    rope = {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"}
    text = {**heads, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64}
    config = Qwen2_5_VLConfig(
        text_config={**text, "rope_scaling": rope, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0},
        vision_config={**heads, "depth": 2, "num_heads": 2, "out_hidden_size": 16},
    )
    encoder = Qwen2_5_VLForConditionalGeneration(config)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    QwenImagePipeline(scheduler, own_vae, encoder, t5_tokenizer(), transformer).save_pretrained(folder)
    return folder
