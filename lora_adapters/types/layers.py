"""The parts of an adapter in the LoRA layers of a model. No other file but a type's own names these parts."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from lora_adapters.convert.deltas.low_rank import LowRank

from .found_layers import lora_layers

# What a layer of PEFT's keeps of its adapters, by their names.
HELD = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
DOWN_HELD = ("lora_A", "lora_embedding_A")  # those that a layer's scaling belongs to
ADDED = tuple(f".{name}" for name in (*HELD, "lora_dropout", "base_layer"))  # what PEFT adds below a layer's path


class Factors(NamedTuple):
    """The modules of one adapter in one layer, each with a `weight`: x goes through `down`, then `up`."""

    down: Any
    up: Any


def layers(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, Any]]:
    """(path, layer) of every LoRA layer that has the adapter; the path is the adapted layer's own."""
    return ((path, layer) for path, layer in lora_layers(model) if adapter_name in layer.lora_A)


def has_adapter(module: nn.Module, adapter_name: str) -> bool:
    """Whether a module is a LoRA layer that has the adapter."""
    return isinstance(module, LoraLayer) and adapter_name in module.lora_A


def factors(layer: Any, adapter_name: str) -> Factors:
    """The factors of an adapter in a layer, as modules."""
    return Factors(layer.lora_A[adapter_name], layer.lora_B[adapter_name])


def magnitude(layer: Any, adapter_name: str) -> nn.Module | None:
    """DoRA's magnitudes of an adapter in a layer, where it has them."""
    held = layer.lora_magnitude_vector  # a ModuleDict or a dict, by the version
    return held[adapter_name] if adapter_name in held else None  # noqa: SIM401


def width(layer: Any, adapter_name: str) -> int:
    """The number of components that there is room for: the rank, or more where the factors are padded with zeros."""
    return layer.lora_A[adapter_name].weight.shape[0]


def is_factor(name: str) -> bool:
    """Whether a parameter of this name (see `named_parameters`) is a factor of an adapter."""
    return ".lora_A." in name or ".lora_B." in name


def low_rank(layer: Any, adapter_name: str, stabilized: bool = False) -> LowRank:
    """The change of plain LoRA in a layer.

    Args:
        layer: A LoRA layer that has the adapter.
        adapter_name: The adapter's name.
        stabilized: Whether its scale is alpha/sqrt(rank) (rsLoRA).

    Returns:
        A pair of views of the live weights, without padding.
    """
    down, up = (factor.weight.detach() for factor in factors(layer, adapter_name))
    rank, alpha = layer.r[adapter_name], float(layer.lora_alpha[adapter_name])
    if stabilized:
        alpha *= rank**0.5
    # An adapter that is prepared to be swapped is padded with zeros; one that PEFT has combined may be narrower than
    # the rank that its alpha belongs to.
    held = min(rank, down.shape[0])
    return LowRank(down[:held], up[:, :held], alpha * held / rank)


def put(layer: Any, adapter_name: str, pair: LowRank, device: torch.device, dtype: torch.dtype) -> None:
    """Replace the weights of an adapter in a layer. They are trainable if the old ones were.

    Args:
        layer: A LoRA layer that has the adapter.
        adapter_name: The adapter's name.
        pair: The new factors, which are copied. If alpha is 0, `up` becomes zeros.
        device: The device of the new weights.
        dtype: The dtype of the new weights.
    """
    up = pair.up if pair.alpha else torch.zeros_like(pair.up)
    for part, values in zip(factors(layer, adapter_name), (pair.down, up), strict=True):
        # A copy, so that the model does not hang on a memory-mapped file.
        values = values.to(device, dtype, copy=True).contiguous()
        # Put there directly: a model that another thread opens has torch.nn.Module patched so that what is assigned
        # to a module's attribute has no memory.
        part._parameters["weight"] = nn.Parameter(values, part.weight.requires_grad)
