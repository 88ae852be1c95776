"""Tiny pipelines of diffusion transformers, and adapters for them with kohya's names."""

import diffusers
import torch
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

_FLUX = {
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "pooled_projection_dim": 8,
    "axes_dims_rope": (2, 2, 4),
}
_TEXT = {"vocab_size": 16, "num_hidden_layers": 1}
CONFIGS = {
    "FluxTransformer2DModel": _FLUX,
    "ChromaTransformer2DModel": {key: value for key, value in _FLUX.items() if key != "pooled_projection_dim"}
    | {"approximator_num_channels": 8, "approximator_hidden_dim": 8, "approximator_layers": 1},
    "SD3Transformer2DModel": {
        "sample_size": 4,
        "patch_size": 1,
        "in_channels": 4,
        "num_layers": 3,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 12,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 8,
        "out_channels": 4,
        "pos_embed_max_size": 4,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    },
    "Lumina2Transformer2DModel": {
        "sample_size": 4,
        "patch_size": 1,
        "in_channels": 4,
        "hidden_size": 24,
        "num_layers": 2,
        "num_refiner_layers": 1,
        "num_attention_heads": 4,
        "num_kv_heads": 2,
        "multiple_of": 8,
        "axes_dim_rope": (2, 2, 2),
        "axes_lens": (8, 8, 8),
        "cap_feat_dim": 12,
    },
    "QwenImageTransformer2DModel": {
        "patch_size": 1,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 12,
        "axes_dims_rope": (2, 2, 4),
    },
    "ZImageTransformer2DModel": {
        "all_patch_size": (2,),
        "all_f_patch_size": (1,),
        "in_channels": 4,
        "dim": 16,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": 12,
        "axes_dims": (2, 2, 4),
        "axes_lens": (8, 8, 8),
    },
    "Flux2Transformer2DModel": {
        "in_channels": 4,
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 12,
        "timestep_guidance_channels": 8,
        "axes_dims_rope": (2, 2, 2, 2),
    },
}


def transformer(name: str, seed: int = 0) -> torch.nn.Module:
    """A tiny transformer of that class of diffusers, with random weights."""
    torch.manual_seed(seed)
    return getattr(diffusers, name)(**CONFIGS[name]).eval()


def flux(text: bool = True) -> diffusers.FluxPipeline:
    """A pipeline of a tiny Flux.1, with or without CLIP and T5."""
    model = transformer("FluxTransformer2DModel")
    clip = (
        CLIPTextModel(CLIPTextConfig(**_TEXT, hidden_size=8, intermediate_size=16, num_attention_heads=2))
        if text
        else None
    )
    t5 = T5EncoderModel(T5Config(**_TEXT, d_model=8, d_kv=4, d_ff=16, num_heads=2)) if text else None
    parts = {"text_encoder": clip, "text_encoder_2": t5, "tokenizer": None, "tokenizer_2": None, "vae": None}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return diffusers.FluxPipeline(scheduler=scheduler, transformer=model, **parts)


def sd3() -> diffusers.StableDiffusion3Pipeline:
    """A pipeline of a tiny SD3 without text encoders."""
    names = [f"{part}{end}" for part in ("text_encoder", "tokenizer") for end in ("", "_2", "_3")]
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    model = transformer("SD3Transformer2DModel")
    return diffusers.StableDiffusion3Pipeline(model, scheduler, vae=None, **dict.fromkeys(names))


def pair(name: str, rows: int, columns: int, rank: int, alpha: float | None, seed: int = 0) -> dict[str, torch.Tensor]:
    """A random pair in kohya's format."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {
        f"{name}.lora_down.weight": torch.randn(rank, columns, generator=draw),
        f"{name}.lora_up.weight": torch.randn(rows, rank, generator=draw),
    }
    return tensors if alpha is None else {**tensors, f"{name}.alpha": torch.tensor(alpha)}


def flux_file() -> dict[str, torch.Tensor]:
    """An adapter with each kind of layer in Flux.1 and both text encoders; ranks and alphas differ."""
    return {
        **pair("lora_unet_double_blocks_0_img_attn_qkv", 48, 16, 4, 2.0, 1),
        **pair("lora_unet_double_blocks_1_txt_attn_qkv", 48, 16, 2, 3.0, 2),
        **pair("lora_unet_double_blocks_1_img_mlp_2", 16, 64, 3, None, 3),
        **pair("lora_unet_single_blocks_1_linear1", 112, 16, 4, 1.0, 4),
        **pair("lora_unet_final_layer_adaLN_modulation_1", 32, 16, 4, 1.0, 5),
        **pair("lora_te1_text_model_encoder_layers_0_mlp_fc1", 16, 8, 2, 1.0, 6),
        **pair("lora_te3_encoder_block_0_layer_0_SelfAttention_q", 8, 8, 2, 1.0, 7),
    }
