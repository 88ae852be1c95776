"""A tiny SD1 model as a checkpoint file with the names of the original Stable Diffusion code."""

from pathlib import Path

import torch
from safetensors.torch import load_file

_RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
           "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}  # fmt: skip
_TOP = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
        "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}  # fmt: skip
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def unet_name(name: str) -> str:
    """The original name of a U-Net weight."""
    for ours, original in _TOP.items():
        if name.startswith(f"{ours}."):
            return original + name.removeprefix(ours)
    parts = name.split(".")
    if parts[0] == "mid_block":
        kind, layer, rest = parts[1], int(parts[2]), ".".join(parts[3:])
        place = f"middle_block.{1 if kind == 'attentions' else 2 * layer}"
    else:
        half, block, kind, layer, rest = parts[0], int(parts[1]), parts[2], int(parts[3]), ".".join(parts[4:])
        if kind == "downsamplers":
            return f"input_blocks.{3 * (block + 1)}.0.op.{parts[-1]}"
        if kind == "upsamplers":
            return f"output_blocks.{3 * block + 2}.{1 if block == 0 else 2}.conv.{parts[-1]}"
        sub = 1 if kind == "attentions" else 0
        place = f"input_blocks.{3 * block + layer + 1}.{sub}" if half == "down_blocks" else ""
        place = place or f"output_blocks.{3 * block + layer}.{sub}"
    if kind == "resnets":
        part, _, last = rest.partition(".")
        rest = f"{_RESNET[part]}.{last}"
    return f"{place}.{rest}"


def vae_name(name: str) -> str:
    """The original name of a weight of a VAE with four levels."""
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = name.replace("mid_block.resnets.0", "mid.block_1").replace("mid_block.resnets.1", "mid.block_2")
    if "mid_block.attentions.0" in name:
        name = name.replace("mid_block.attentions.0", "mid.attn_1")
        for ours, original in _VAE_ATTENTION.items():
            name = name.replace(f"attn_1.{ours}.", f"attn_1.{original}.")
    for i in range(4):
        name = name.replace(f"down_blocks.{i}.downsamplers.0", f"down.{i}.downsample")
        name = name.replace(f"up_blocks.{i}.upsamplers.0", f"up.{3 - i}.upsample")
        for j in range(3):
            name = name.replace(f"down_blocks.{i}.resnets.{j}", f"down.{i}.block.{j}")
            name = name.replace(f"up_blocks.{i}.resnets.{j}", f"up.{3 - i}.block.{j}")
    return name


def checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a Diffusers folder under their original names."""
    made = {}
    for name, weight in load_file(folder / "unet" / "diffusion_pytorch_model.safetensors").items():
        made[f"model.diffusion_model.{unet_name(name)}"] = weight
    for name, weight in load_file(folder / "vae" / "diffusion_pytorch_model.safetensors").items():
        square = "attn_1" in vae_name(name) and weight.ndim == 2
        made[f"first_stage_model.{vae_name(name)}"] = weight[:, :, None, None] if square else weight
    for name, weight in load_file(folder / "text_encoder" / "model.safetensors").items():
        inner = name if name.startswith("text_model.") else f"text_model.{name}"
        made[f"cond_stage_model.transformer.{inner}"] = weight
    return {name: weight.contiguous() for name, weight in made.items()}
