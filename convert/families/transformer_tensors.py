"""Converting all tensors of a diffusion transformer between the original code's names and diffusers'.

The layers are described by `Transformer`; biases are placed like their layer's weight. Names have no prefix here.
"""

from collections.abc import Collection, Mapping

import torch

from lora_adapters.convert.errors import AdapterError

from .original_layout import Form, Origin
from .tensor_slice import TensorSlice
from .transformer import Transformer


def from_original(
    layout: Transformer, keys: Collection[str], tensors: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Make the tensors of diffusers' model from those of an original file, as views if possible.

    Args:
        layout: The layout of the transformer.
        keys: The names in diffusers' model, as in its `state_dict`.
        tensors: The tensors of the file, by their names in the original code.

    Returns:
        The tensors by `keys`.

    Raises:
        AdapterError: The file lacks a tensor, or its shape is impossible for a fused layer.
    """
    found, shapes = {}, {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for key in keys:
        place = _place(layout, key, shapes)
        if place is None or place.key not in tensors:
            raise AdapterError(f"it lacks {key if place is None else place.key}")
        found[key] = place.of(tensors[place.key])
    return found


def _place(layout: Transformer, key: str, shapes: Mapping[str, tuple[int, ...]]) -> TensorSlice | None:
    """The place of a tensor of diffusers' model in an original file with tensors of these shapes."""
    if key in layout.single_tensors:
        return TensorSlice(layout.single_tensors[key])
    path, _, kind = key.rpartition(".")
    weight = layout.place(path)
    if weight is None or kind not in ("weight", "bias"):
        return None
    if weight.key in shapes:
        weight = weight.placed(shapes[weight.key])
    return weight.bias if kind == "bias" else weight


def to_original(layout: Transformer, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Origin]:
    """The sources of the tensors of an original file: diffusers' tensors that each is made from.

    Args:
        layout: The layout of the transformer.
        shapes: The shapes of diffusers' tensors, by their names.

    Returns:
        The source of each tensor, by the name in the original code.

    Raises:
        AdapterError: A tensor has no name in the original code, or a part of a fused layer is missing.
    """
    made = {layout.single_tensors[key]: Origin((key,)) for key in shapes if key in layout.single_tensors}
    left = {key for key in shapes if key not in layout.single_tensors}
    for name, target in layout.originals.items():
        for kind in ("weight", "bias"):
            keys = tuple(f"{path}.{kind}" for path in target.paths)
            there = [key for key in keys if key in shapes]
            if not there:
                continue
            if len(there) < len(keys):
                raise AdapterError(f"has {there[0]}, but no {next(key for key in keys if key not in shapes)}")
            weight = TensorSlice(name, swapped=target.swapped).placed(shapes[f"{target.paths[0]}.weight"])
            form: Form = "stacked" if len(keys) > 1 else "swapped" if weight.swapped else "same"
            made[f"{name}.{kind}"] = Origin(keys, form)
            left.difference_update(keys)
    if left:
        raise AdapterError(f"{min(left)} has no name in the original layout: write a Diffusers folder instead")
    return made
