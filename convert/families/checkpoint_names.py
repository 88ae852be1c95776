"""Where the weight of an adapted module stands in a checkpoint, by the names of its tensors.

U-Net                  model.diffusion_model.input_blocks.1.1...         SD1.x, SD2.x, SDXL
text encoder           cond_stage_model.transformer[.text_model]...      SD1.x
                       cond_stage_model.model.transformer.resblocks...   SD2.x (open_clip: q, k and v are one tensor)
SDXL's text encoders   conditioner.embedders.0.transformer.text_model...
                       conditioner.embedders.1.model.transformer.resblocks..., .text_projection (transposed)
Diffusers folders      the module's own path in the component's file, with or without `text_model.`
"""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

import torch

from .names import TEXT_PROJECTION, ModuleName, sgm_path, text_encoder_paths, unet_paths

_UNET = "model.diffusion_model."
_CLIP = {"text_encoder": ("cond_stage_model.transformer.", "conditioner.embedders.0.transformer.")}
_OPEN_CLIP = {
    "text_encoder": ("cond_stage_model.model.transformer.",),
    "text_encoder_2": ("conditioner.embedders.1.model.transformer.",),
}
_OPEN_CLIP_PROJECTION = "conditioner.embedders.1.model.text_projection"
_LAYER = re.compile(r"text_model\.encoder\.layers\.(\d+)\.(.+)")
_SPARE_LAYER = 23  # the last of open_clip's ViT-H: in SD2.x's own files, though no output of it is used
_OPEN_CLIP_PARTS = {
    "self_attn.q_proj": ("attn.in_proj_weight", 0),
    "self_attn.k_proj": ("attn.in_proj_weight", 1),
    "self_attn.v_proj": ("attn.in_proj_weight", 2),
    "self_attn.out_proj": ("attn.out_proj.weight", None),
    "mlp.fc1": ("mlp.c_fc.weight", None),
    "mlp.fc2": ("mlp.c_proj.weight", None),
}


class Place(NamedTuple):
    """The key of a tensor, which third of its rows is meant (None: all of it), and whether it is transposed there."""

    key: str
    third: int | None = None
    transposed: bool = False

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The module's own weight in the tensor, a view."""
        part = tensor if self.third is None else tensor.chunk(3)[self.third]
        return part.T if self.transposed else part


def _candidates(module: ModuleName, architecture: str) -> Iterator[Place]:
    if module.component == "unet":
        yield Place(f"{_UNET}{sgm_path(module.path, architecture)}.weight")
        return
    if module.path == TEXT_PROJECTION:
        yield Place(_OPEN_CLIP_PROJECTION, transposed=True)
        return
    for prefix in _CLIP.get(module.component, ()):
        yield Place(f"{prefix}{module.path}.weight")
        yield Place(f"{prefix}{module.path.removeprefix('text_model.')}.weight")
    match = _LAYER.fullmatch(module.path)
    assert match, module
    part, third = _OPEN_CLIP_PARTS[match[2]]
    for prefix in _OPEN_CLIP[module.component]:
        yield Place(f"{prefix}resblocks.{match[1]}.{part}", third)


def architecture_of_file(keys: Collection[str]) -> str | None:
    """ "sd" or "sdxl" by the names in a single-file checkpoint; None where there is no U-Net of either."""
    if not any(key.startswith(_UNET) for key in keys):
        return None
    if any(key.startswith(f"{_UNET}input_blocks.1.1.") for key in keys):  # attention at full size: none in SDXL
        return "sd"
    sdxl = any(key.startswith(("conditioner.embedders.", f"{_UNET}label_emb.")) for key in keys)
    return "sdxl" if sdxl else "sd"


def _text_paths(component: str) -> list[str]:
    return [*text_encoder_paths(), *([TEXT_PROJECTION] if component == "text_encoder_2" else [])]


def places_in_file(tensors: Mapping[str, torch.Tensor], architecture: str) -> dict[ModuleName, Place]:
    """The places of all modules that a single-file checkpoint has."""
    modules = [ModuleName("unet", path) for path in sorted(unet_paths(architecture))]
    for component in ("text_encoder", "text_encoder_2") if architecture == "sdxl" else ("text_encoder",):
        modules += [ModuleName(component, path) for path in _text_paths(component)]
    found = {}
    for module in modules:
        place = next((place for place in _candidates(module, architecture) if place.key in tensors), None)
        if place is not None:
            found[module] = place
    if architecture == "sd" and any(place.third is not None for place in found.values()):
        found = {module: place for module, place in found.items() if f".layers.{_SPARE_LAYER}." not in module.path}
    return found


def places_in_component(tensors: Mapping[str, torch.Tensor], component: str, architecture: str) -> dict:
    """The places of all modules that a file of a Diffusers folder's component has."""
    paths = sorted(unet_paths(architecture)) if component == "unet" else _text_paths(component)
    found = {}
    for path in paths:
        for spelling in (path, path.removeprefix("text_model.")):
            if f"{spelling}.weight" in tensors:
                found[ModuleName(component, path)] = Place(f"{spelling}.weight")
                break
    return found
