"""Finding the weights of adapted layers in a model's files by the names of the tensors.

Original checkpoints   the names of the original code, from the families' layouts
Diffusers folders      the layer's path in the component's file, with or without `text_model.`
"""

from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress

import torch

from lora_adapters.convert.errors import AdapterError

from .family import ModelFamily
from .names import ModuleName, bias_of
from .registry import FAMILIES
from .tensor_slice import TensorSlice
from .text_encoder import TextEncoder
from .unet import PREFIX, UNet


def family_of_file(keys: Collection[str]) -> ModelFamily | None:
    """Recognise the family of an original checkpoint by its tensor names; None if it has no known denoiser."""
    has_unet = any(key.startswith(PREFIX) for key in keys)
    for family in FAMILIES:
        if (has_unet or not isinstance(family.denoiser.layout, UNet)) and any(
            key.startswith(family.marks.tensors) for key in keys
        ):
            return family
    return FAMILIES[0] if has_unet else None


def family_of_folder(components: Collection[str], keys: Iterable[str], class_name: str = "") -> ModelFamily:
    """Recognise the family of a Diffusers folder by its components, its denoiser's class, and its tensor names."""
    keys = list(keys)
    alike = [family for family in FAMILIES if family.denoiser.name in components]
    for family in alike:
        if class_name and class_name in family.marks.classes:
            return family
    for family in alike:
        marks = family.marks
        if any(name in components for name in marks.components) or any(key.startswith(marks.keys) for key in keys):
            return family
    return alike[0]


def slices_in_file(tensors: Mapping[str, torch.Tensor], family: ModelFamily) -> dict[ModuleName, TensorSlice]:
    """Find the weights of all layers in an original checkpoint."""
    slices = {}
    for component in family.components:
        for layer in family.layers(component.name):
            part = next((part for part in layer.originals if part.key in tensors), None)
            if part is not None and not _is_unused(component.layout, layer.module.path, part):
                with suppress(AdapterError):  # a packed quantised weight is refused later, when it is needed
                    slices[layer.module] = part.placed(tuple(tensors[part.key].shape))
    return slices


def _is_unused(layout: object, path: str, part: TensorSlice) -> bool:
    return isinstance(layout, TextEncoder) and layout.is_unused(path, part)


def slices_in_component(
    tensors: Mapping[str, torch.Tensor], component: str, family: ModelFamily
) -> dict[ModuleName, TensorSlice]:
    """Find the weights of all layers in a weights file of a component of a Diffusers folder."""
    slices = {}
    for layer in family.layers(component):
        path = layer.module.path
        for spelling in (path, path.removeprefix("text_model.")):
            if f"{spelling}.weight" in tensors:
                slices[layer.module] = TensorSlice(f"{spelling}.weight")
                break
    return slices


def other_slices_in_file(tensors: Mapping[str, torch.Tensor], family: ModelFamily) -> dict[ModuleName, TensorSlice]:
    """Find the weights of normalisation layers and all biases (see `names.bias_of`) in an original checkpoint."""
    slices = {}
    for component in family.components:
        for path in family.norms(component.name):
            part = next((part for part in component.layout.slices(path) if part.key in tensors), None)
            if part is not None and not _is_unused(component.layout, path, part):
                slices[ModuleName(component.name, path)] = part
    weights = {**slices_in_file(tensors, family), **slices}
    biases = {bias_of(module): part.bias for module, part in weights.items()}
    return slices | {name: part for name, part in biases.items() if part is not None and part.key in tensors}


def other_slices_in_component(
    tensors: Mapping[str, torch.Tensor], component: str, family: ModelFamily
) -> dict[ModuleName, TensorSlice]:
    """Find the weights of normalisation layers and all biases in a weights file of a component."""
    norms = family.norms(component)
    slices = {}
    for path in family.paths(component) | norms:
        module = ModuleName(component, path)
        for spelling in (path, path.removeprefix("text_model.")):
            if path in norms and f"{spelling}.weight" in tensors:
                slices[module] = TensorSlice(f"{spelling}.weight")
            if f"{spelling}.bias" in tensors:
                slices[bias_of(module)] = TensorSlice(f"{spelling}.bias")
    return slices
