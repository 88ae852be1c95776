"""Tiny pipelines of families for image generation only, as folders."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    ChromaPipeline,
    ChromaTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from transformers import (
    Gemma2Config,
    Gemma2Model,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3Model,
)

from .transformers import CHANNELS, t5, t5_tokenizer, vae

TEXT = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
}


def build_chroma(folder: Path) -> Path:
    """Chroma's layout: two double and two single blocks, and T5 as the only text encoder."""
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
    """Qwen-Image's layout: two blocks, a video VAE, Qwen2.5-VL."""
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


def build_lumina2(folder: Path) -> Path:
    """Lumina-Image 2's layout: two blocks and their refiners, Gemma 2."""
    torch.manual_seed(0)
    transformer = Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=CHANNELS,
        hidden_size=32,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=2,
        multiple_of=16,
        axes_dim_rope=(8, 4, 4),
        axes_lens=(300, 64, 64),
        cap_feat_dim=16,
    )
    encoder = Gemma2Model(Gemma2Config(**TEXT))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=6.0)
    Lumina2Pipeline(transformer, scheduler, vae(), encoder, t5_tokenizer()).save_pretrained(folder)
    return folder


def build_zimage(folder: Path) -> Path:
    """Z-Image's layout: two blocks and their refiners, and Qwen3, whose tokenizer has a chat template."""
    from diffusers import ZImagePipeline, ZImageTransformer2DModel  # not in the oldest supported version

    torch.manual_seed(0)
    transformer = ZImageTransformer2DModel(
        in_channels=CHANNELS,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[512, 32, 32],
    )
    tokenizer = t5_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    encoder = Qwen3Model(Qwen3Config(**TEXT))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    ZImagePipeline(scheduler, vae(), encoder, tokenizer, transformer).save_pretrained(folder)
    return folder
