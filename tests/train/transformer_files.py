"""Parts of tiny transformer models as separate files, in the layout of kohya's trainers and ComfyUI."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from lora_adapters.convert.families.registry import by_name
from lora_adapters.convert.families.transformer_tensors import to_original

from .single_files import vae_name

Tensors = dict[str, torch.Tensor]


def original_transformer(folder: Path, family: str) -> Tensors:
    """The transformer's tensors under the original code's names."""
    ours = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    made = {}
    origins = to_original(by_name(family).denoiser.layout, {name: tuple(one.shape) for name, one in ours.items()})
    for name, origin in origins.items():
        parts = [ours[key] for key in origin.keys]
        made[name] = torch.cat(parts[0].chunk(2)[::-1]) if origin.form == "swapped" else torch.cat(parts)
    return made


def original_vae(folder: Path) -> Tensors:
    """The VAE's tensors under the original code's names, its attention as 1x1 convolutions."""
    made = {}
    for name, weight in load_file(folder / "vae" / "diffusion_pytorch_model.safetensors").items():
        square = "attn_1" in vae_name(name) and weight.ndim == 2
        made[vae_name(name)] = (weight[:, :, None, None] if square else weight).contiguous()
    return made


def text(folder: Path, component: str) -> Tensors:
    """A text encoder's tensors; CLIP's names start with `text_model.`, as in such files."""
    found = load_file(folder / component / "model.safetensors")
    clip = any("self_attn" in name for name in found)
    bare = ("text_model.", "text_projection.")
    return {f"text_model.{name}" if clip and not name.startswith(bare) else name: one for name, one in found.items()}


def with_prefix(prefix: str, tensors: Tensors) -> Tensors:
    return {f"{prefix}{name}": one for name, one in tensors.items()}


def flux_files(folder: Path, to: Path) -> dict[str, str]:
    """Write Flux.1's four files. Returns option -> path; --model_config is the source folder."""
    to.mkdir(exist_ok=True)
    save_file(original_transformer(folder, "flux"), to / "flux.safetensors")
    save_file(text(folder, "text_encoder"), to / "clip_l.safetensors")
    save_file(text(folder, "text_encoder_2"), to / "t5xxl.safetensors")
    save_file(original_vae(folder), to / "ae.safetensors")
    return {
        "pretrained_model_name_or_path": str(to / "flux.safetensors"),
        **{name: str(to / f"{name}.safetensors") for name in ("clip_l", "t5xxl", "ae")},
        "model_config": str(folder),
    }


def sd3_file(folder: Path, to: Path, texts: tuple[str, ...] = ("clip_l", "clip_g", "t5xxl")) -> dict[str, str]:
    """Write SD3 as one file with these text encoders. Returns option -> path."""
    components = {"clip_l": "text_encoder", "clip_g": "text_encoder_2", "t5xxl": "text_encoder_3"}
    tensors = with_prefix("model.diffusion_model.", original_transformer(folder, "sd3"))
    tensors |= with_prefix("first_stage_model.", original_vae(folder))
    for name in texts:
        tensors |= with_prefix(f"text_encoders.{name}.transformer.", text(folder, components[name]))
    save_file(tensors, to)
    return {"pretrained_model_name_or_path": str(to), "model_config": str(folder)}
