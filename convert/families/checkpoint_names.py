"""Where the weights of adapted layers are in a model's files, by the names of its tensors.

Original checkpoints   the names of the original code, as the families' layouts have them
Diffusers folders      the layer's own path in the component's file, with or without `text_model.`
"""

from collections.abc import Collection, Iterable, Mapping

import torch

from .family import ModelFamily
from .names import ModuleName
from .registry import FAMILIES
from .tensor_slice import TensorSlice
from .text_encoder import TextEncoder
from .unet import PREFIX


def family_of_file(keys: Collection[str]) -> ModelFamily | None:
    """The family by the names in an original checkpoint; None where there is no U-Net of any."""
    if not any(key.startswith(PREFIX) for key in keys):
        return None
    marked = (family for family in FAMILIES if any(key.startswith(family.marks.tensors) for key in keys))
    return next(marked, FAMILIES[0])


def family_of_folder(components: Collection[str], keys: Iterable[str]) -> ModelFamily:
    """The family by the components of a Diffusers folder and the names in their files."""
    keys = list(keys)
    for family in FAMILIES:
        marks = family.marks
        if any(name in components for name in marks.components) or any(key.startswith(marks.keys) for key in keys):
            return family
    return FAMILIES[0]


def slices_in_file(tensors: Mapping[str, torch.Tensor], family: ModelFamily) -> dict[ModuleName, TensorSlice]:
    """Where an original checkpoint has the weights of all layers that it has."""
    found = {}
    for component in family.components:
        for layer in family.layers(component.name):
            part = next((part for part in layer.originals if part.key in tensors), None)
            if part is not None and not _is_unused(component.layout, layer.module.path, part):
                found[layer.module] = part
    return found


def _is_unused(layout: object, path: str, part: TensorSlice) -> bool:
    return isinstance(layout, TextEncoder) and layout.is_unused(path, part)


def slices_in_component(
    tensors: Mapping[str, torch.Tensor], component: str, family: ModelFamily
) -> dict[ModuleName, TensorSlice]:
    """Where a file of a Diffusers folder's component has the weights of all layers that it has."""
    found = {}
    for layer in family.layers(component):
        path = layer.module.path
        for spelling in (path, path.removeprefix("text_model.")):
            if f"{spelling}.weight" in tensors:
                found[layer.module] = TensorSlice(f"{spelling}.weight")
                break
    return found
