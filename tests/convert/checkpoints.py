"""The tiny golden models as checkpoint files under the names of the original code: SD1.x, SD2.x and SDXL."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.train.single_files import unet_name

GOLDEN = Path(__file__).parent.parent / "golden"
_PARTS = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}


def weights(folder: Path, component: str) -> dict[str, torch.Tensor]:
    """A component's weights; text encoders' names start with `text_model.`."""
    name = "diffusion_pytorch_model" if component == "unet" else "model"
    tensors = load_file(folder / component / f"{name}.safetensors")
    if component == "unet":
        return tensors
    return {key if key.startswith("text_") else f"text_model.{key}": tensor for key, tensor in tensors.items()}


def open_clip(tensors: dict[str, torch.Tensor], prefix: str, spare_layer: bool = False) -> dict[str, torch.Tensor]:
    """The layers of a CLIP text encoder with open_clip's names, where q, k and v are one tensor.

    spare_layer: add SD2.x's 24th layer, whose output is not used.
    """
    start = "text_model.encoder.layers."
    layers = 1 + max(int(key.split(".")[3]) for key in tensors if key.startswith(start))
    made = {}
    for layer in range(layers):
        own = f"{start}{layer}."
        target = f"{prefix}resblocks.{layer}."
        for kind in ("weight", "bias"):
            parts = [tensors[f"{own}self_attn.{part}_proj.{kind}"] for part in ("q", "k", "v")]
            made[f"{target}attn.in_proj_{kind}"] = torch.cat(parts)
            made[f"{target}attn.out_proj.{kind}"] = tensors[f"{own}self_attn.out_proj.{kind}"]
            for ours, theirs in _PARTS.items():
                made[f"{target}{theirs}.{kind}"] = tensors[f"{own}{ours}.{kind}"]
    if spare_layer:
        last = f"{prefix}resblocks.{layers - 1}."
        copied = [key for key in made if key.startswith(last)]
        made |= {key.replace(last, f"{prefix}resblocks.23."): made[key].clone() for key in copied}
    return made


def original_unet_name(name: str, size: str) -> str:
    """The original name of a U-Net weight of SD1.x, SD2.x or SDXL ("sdxl")."""
    if name.startswith("add_embedding.linear_"):
        return f"label_emb.0.{0 if '_1' in name else 2}.{name.split('.')[-1]}"
    name = unet_name(name)
    # SDXL's deepest block has attention before the upsampler.
    return name.replace("output_blocks.2.1.conv.", "output_blocks.2.2.conv.") if size == "sdxl" else name


def original(kind: str, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """A checkpoint of kind "sd1", "sd2" or "sdxl", with a weight of the VAE and an integer tensor."""
    folder = GOLDEN / ("sdxl" if kind == "sdxl" else "sd15")
    made = {}
    for key, tensor in weights(folder, "unet").items():
        made[f"model.diffusion_model.{original_unet_name(key, kind)}"] = tensor
    text = weights(folder, "text_encoder")
    if kind == "sd1":
        made |= {f"cond_stage_model.transformer.{key}": tensor for key, tensor in text.items()}
    elif kind == "sd2":
        made |= open_clip(text, "cond_stage_model.model.transformer.", spare_layer=True)
    else:
        made |= {f"conditioner.embedders.0.transformer.{key}": tensor for key, tensor in text.items()}
        second = weights(folder, "text_encoder_2")
        made |= open_clip(second, "conditioner.embedders.1.model.transformer.")
        made["conditioner.embedders.1.model.text_projection"] = second["text_projection.weight"].T
    made["first_stage_model.encoder.conv_in.weight"] = torch.randn(4, 3, 3, 3)
    made = {key: tensor.to(dtype).contiguous() if dtype else tensor.contiguous() for key, tensor in made.items()}
    made["cond_stage_model.transformer.position_ids"] = torch.arange(77)[None]
    made["model_ema.decay"] = torch.tensor(0.9999)
    return made
