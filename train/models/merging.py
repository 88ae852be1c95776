"""Adapters' changes added to the weights of live models."""

from collections.abc import Sequence
from typing import Any

import torch

from lora_adapters.convert.adapter import Adapter
from lora_adapters.convert.deltas.low_rank import LowRank
from lora_adapters.convert.errors import AdapterError
from lora_adapters.injection import match_to_model as in_model
from lora_adapters.train.models.base import BaseModels

Placed = list[tuple[Any, LowRank]]  # a layer, and the change of its weight


def match_to_model(models: BaseModels, adapter: Adapter) -> Placed:
    """The adapter's changes with the layers of `models` that they are for. AdapterError if one fits nowhere."""
    found: Placed = []
    for component in adapter.components:
        if component not in models.components:
            raise AdapterError(f"it adapts {component}, which {models.name or 'the model'} does not have")
    for component, model in models.components.items():
        modules = {name.path: pair for name, pair in adapter.pairs().items() if name.component == component}
        found += [(model.get_submodule(path), pair) for path, pair in in_model(model, component, modules).items()]
    return found


@torch.no_grad()
def merge_weights(changes: Sequence[tuple[Placed, float]], originals: dict[Any, torch.Tensor] | None = None) -> None:
    """Set each weight to itself plus Σ multiplier · ΔW, summed in float32 and rounded once.

    Args:
        changes: pairs of changes and multiplier.
        originals: the weights to start from, by layer, in place of the present ones; layers without a change are set
            back to them.
    """
    by_layer: dict[Any, list[tuple[LowRank, float]]] = {layer: [] for layer in originals or {}}
    for placed, multiplier in changes:
        for layer, pair in placed:
            by_layer.setdefault(layer, []).append((pair, multiplier))
    for layer, pairs in by_layer.items():
        weight = layer.weight if originals is None else originals[layer]
        total = weight.to(layer.weight.device, torch.float32)
        for pair, multiplier in pairs:
            if multiplier:
                delta = LowRank(pair.down.to(total.device), pair.up.to(total.device), pair.alpha * multiplier).delta()
                total = total + delta.reshape(total.shape)
        layer.weight.copy_(total)
