"""Full-size pipelines that need no memory: every weight of the base model is a single number, expanded to its shape.

Adapters are loaded into them as into real pipelines. Running and fusing need a U-Net with real weights
(`give_weights`).
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
)

TINY = Path(__file__).resolve().parent.parent.parent.parent / "examples" / "tiny-sd"
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
T5_XXL = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}


def weightless(make: Any, dtype: torch.dtype = torch.float16) -> nn.Module:
    """The module that `make()` creates, with every parameter an expanded zero."""
    with torch.device("meta"):
        model = make()
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                zero = torch.zeros((), dtype=dtype).expand(parameter.shape)
                module._parameters[name] = nn.Parameter(zero, requires_grad=False)
                # as after from_pretrained: else transformers initialises weights again when stock code loads an adapter
                module._parameters[name]._is_hf_initialized = True
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)
                module._buffers[name]._is_hf_initialized = True
        module._is_hf_initialized = True
    return model.eval()


def give_weights(model: nn.Module) -> None:
    """Give a model from `weightless` real random weights in float32."""
    torch.manual_seed(0)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                # keeps the scale of signals, like trained weights
                spread = (3 / max(1, parameter[0].numel())) ** 0.5 if parameter.ndim > 1 else 0.1
                weights = torch.empty(parameter.shape).uniform_(-spread, spread)
                module._parameters[name] = nn.Parameter(weights, requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                module._buffers[name] = buffer.float()


def pipeline(size: str) -> Any:
    """A StableDiffusionPipeline ("sd15"), StableDiffusionXLPipeline ("sdxl") or FluxPipeline ("flux") with the module
    names and shapes of the released models."""
    tokenizer = CLIPTokenizer.from_pretrained(TINY / "tokenizer")
    parts = {
        "vae": weightless(lambda: AutoencoderKL(block_out_channels=(32,), norm_num_groups=8)),
        "tokenizer": tokenizer,
        "scheduler": EulerDiscreteScheduler(),
    }
    text = weightless(lambda: CLIPTextModel(CLIPTextConfig(**CLIP_L)))
    if size == "flux":
        t5 = T5Config(**T5_XXL, feed_forward_proj="gated-gelu")
        return FluxPipeline(
            **parts | {"scheduler": FlowMatchEulerDiscreteScheduler()},
            text_encoder=text,
            text_encoder_2=weightless(lambda: T5EncoderModel(t5)),
            tokenizer_2=tokenizer,
            transformer=weightless(lambda: FluxTransformer2DModel(guidance_embeds=True), torch.bfloat16),
        )
    if size == "sd15":
        unet = weightless(lambda: UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8))
        return StableDiffusionPipeline(
            **parts, text_encoder=text, unet=unet, safety_checker=None, feature_extractor=None,
            requires_safety_checker=False,
        )  # fmt: skip
    unet = weightless(
        lambda: UNet2DConditionModel(
            sample_size=128,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
    )
    text_2 = weightless(lambda: CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_G, projection_dim=1280)))
    return StableDiffusionXLPipeline(
        **parts, text_encoder=text, text_encoder_2=text_2, tokenizer_2=tokenizer, unet=unet,
        add_watermarker=False, force_zeros_for_empty_prompt=True,
    )  # fmt: skip
