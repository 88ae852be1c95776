"""Merges adapters into the weights of loaded models."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lora_adapters.convert.adapter import Adapter
from lora_adapters.convert.deltas.base import Delta, with_tensors
from lora_adapters.convert.deltas.sum import as_pair
from lora_adapters.convert.errors import AdapterError
from lora_adapters.injection import match_to_model as in_model
from lora_adapters.train.models.base import BaseModels

Placed = list[tuple[Any, Delta]]  # (layer, delta)


def match_to_model(models: BaseModels, adapter: Adapter) -> Placed:
    """Pair an adapter's deltas with the layers of `models`. AdapterError if a delta fits no layer."""
    placed: Placed = []
    for component in adapter.components:
        if component not in models.components:
            raise AdapterError(f"it adapts {component}, which {models.name or 'the model'} does not have")
    for component, model in models.components.items():
        modules = {
            name.path: as_pair(change) or change
            for name, change in adapter.modules.items()
            if name.component == component
        }
        placed += [(model.get_submodule(path), change) for path, change in in_model(model, component, modules).items()]
    return placed


Original = tuple[torch.Tensor, torch.Tensor | None]  # (weight, bias)


def original(layer: Any) -> Original:
    """Copies of a layer's weight and bias."""
    bias = getattr(layer, "bias", None)
    return layer.weight.detach().clone(), None if bias is None else bias.detach().clone()


@torch.no_grad()
def merge_weights(changes: Sequence[tuple[Placed, float]], originals: Mapping[Any, Original] | None = None) -> None:
    """Add Σ multiplier · ΔW to each weight, and likewise to each bias. Sums are float32 and rounded once.

    A delta that depends on the weight (DoRA, OFT) is computed from the weight before merging.

    Args:
        changes: (deltas, multiplier) of each adapter.
        originals: Layer -> weight and bias to start from (see `original`); layers without a delta are reset to them.
            None starts from the present weights.
    """
    by_layer: dict[Any, list[Delta]] = {layer: [] for layer in originals or {}}
    for placed, multiplier in changes:
        for layer, change in placed:
            by_layer.setdefault(layer, [])
            if multiplier:
                by_layer[layer].append(change.scaled(multiplier))
    for layer, scaled in by_layer.items():
        weight, bias = (layer.weight, getattr(layer, "bias", None)) if originals is None else originals[layer]
        base = weight.to(layer.weight.device, torch.float32)
        total, total_bias = base, None if bias is None else bias.to(base.device, torch.float32)
        for change in (_on(base.device, change) for change in scaled):
            if change.changes_weight:
                total = total + change.delta(base).reshape(base.shape)
            if total_bias is not None and (added := change.bias()) is not None:
                total_bias = total_bias + added
        layer.weight.copy_(total)
        if total_bias is not None:
            layer.bias.copy_(total_bias)


def _on(device: torch.device, change: Any) -> Any:
    return with_tensors(change, lambda _, tensor: tensor.to(device))
