"""Flux.1's full size, for measurements: the tensors of its checkpoint, and an adapter as kohya's trainer writes it.

Names are from the original code, and shapes from diffusers' model, which is created without weights.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from lora_adapters.convert.families.registry import by_name

ADAPTED = ("double_blocks.", "single_blocks.")  # kohya's trainer adapts every linear layer of these
_NORMS = {
    "double_blocks.{}.img_attn.norm.query_norm.scale": "transformer_blocks.{}.attn.norm_q.weight",
    "double_blocks.{}.img_attn.norm.key_norm.scale": "transformer_blocks.{}.attn.norm_k.weight",
    "double_blocks.{}.txt_attn.norm.query_norm.scale": "transformer_blocks.{}.attn.norm_added_q.weight",
    "double_blocks.{}.txt_attn.norm.key_norm.scale": "transformer_blocks.{}.attn.norm_added_k.weight",
    "single_blocks.{}.norm.query_norm.scale": "single_transformer_blocks.{}.attn.norm_q.weight",
    "single_blocks.{}.norm.key_norm.scale": "single_transformer_blocks.{}.attn.norm_k.weight",
}


def transformer() -> torch.nn.Module:
    """FLUX.1-dev's transformer; call it in a context where tensors are created on the meta device."""
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(guidance_embeds=True)


def layers() -> dict[str, tuple[int, int]]:
    """The weight shapes of the original code's linear layers, with fused layers."""
    layout = next(one for one in by_name("flux").components if one.name == "transformer").layout
    with torch.device("meta"):
        ours = {name: tuple(weight.shape) for name, weight in transformer().state_dict().items()}
    found = {}
    for original, fused in layout.originals.items():
        shapes = [ours[f"{path}.weight"] for path in fused.paths if f"{path}.weight" in ours]
        if shapes:
            found[original] = (sum(rows for rows, _ in shapes), shapes[0][1])
    return found


def shapes() -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor of flux1-dev.safetensors: 11.9 billion numbers."""
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in layers().items():
        found |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    with torch.device("meta"):
        ours = transformer().state_dict()
    for original, path in _NORMS.items():
        for number in range(64):
            if path.format(number) in ours:
                found[original.format(number)] = tuple(ours[path.format(number)].shape)
    if len(found) != 780 or sum(map(_count, found.values())) != sum(weight.numel() for weight in ours.values()):
        raise AssertionError("these are not all tensors of the model")
    return found


def _count(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def make_zeros(path: Path, table: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> Path:
    """A checkpoint of zeros as a 24 GB sparse file, which is read and used like any other."""
    header, end = {}, 0
    for name, shape in table.items():
        start, end = end, end + _count(shape) * dtype.itemsize
        header[name] = {"dtype": {torch.bfloat16: "BF16"}[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


def make_adapter(path: Path, rank: int, seed: int) -> Path:
    """A random bfloat16 LoRA for all 304 layers of kohya's trainer, with its names."""
    if path.exists():
        return path
    torch.manual_seed(seed)
    made = {}
    for name, (rows, width) in layers().items():
        if name.startswith(ADAPTED):
            key = f"lora_unet_{name.replace('.', '_')}"
            made[f"{key}.lora_down.weight"] = (torch.randn(rank, width) * 0.02).bfloat16()
            made[f"{key}.lora_up.weight"] = (torch.randn(rows, rank) * 0.01).bfloat16()
            made[f"{key}.alpha"] = torch.tensor(float(rank))
    save_file(made, path)
    return path
