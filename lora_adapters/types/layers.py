"""Access to the parts of an adapter in LoRA layers. Only this file and the types' own files use their names."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from lora_adapters.convert.deltas.low_rank import LowRank

from .found_layers import lora_layers

# The attributes in which a PEFT layer stores the parts of its adapters.
HELD = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
DOWN_HELD = ("lora_A", "lora_embedding_A")  # the `down` factors
ADDED = tuple(f".{name}" for name in (*HELD, "lora_dropout", "base_layer"))  # names that PEFT adds below a layer's path


class Factors(NamedTuple):
    """The modules of one adapter in one layer, each with a `weight`: `down` is applied first, then `up`."""

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
    """DoRA's magnitudes of an adapter in a layer; None if it has none."""
    held = layer.lora_magnitude_vector  # a ModuleDict or a dict, depending on the version
    return held[adapter_name] if adapter_name in held else None  # noqa: SIM401


def width(layer: Any, adapter_name: str) -> int:
    """The allocated number of components: the rank, or more if the factors are padded with zeros."""
    return layer.lora_A[adapter_name].weight.shape[0]


def is_factor(name: str) -> bool:
    """Whether a parameter with this name (see `named_parameters`) is a factor of an adapter."""
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
    # An adapter prepared for hot-swapping is padded with zeros; an adapter combined by PEFT may be narrower than the
    # rank for which its alpha was chosen.
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
        # A copy, so that the model does not depend on a memory-mapped file.
        values = values.to(device, dtype, copy=True).contiguous()
        # Set directly: while another thread loads a model, torch.nn.Module may be patched so that parameters assigned
        # to attributes have no memory.
        part._parameters["weight"] = nn.Parameter(values, part.weight.requires_grad)
