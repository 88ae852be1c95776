"""Adapters' changes added to the weights of live models."""

from collections.abc import Sequence
from typing import Any

import torch

from lora_adapters.convert.adapter import Adapter
from lora_adapters.convert.deltas.low_rank import LowRank
from lora_adapters.convert.errors import AdapterError
from lora_adapters.injection import match_to_model
from lora_adapters.train.models.base import BaseModels

Placed = list[tuple[Any, LowRank]]  # the layer, and what is to be added to its weight


def placed(models: BaseModels, adapter: Adapter) -> Placed:
    """The adapter's changes with the layers that they are for. AdapterError where one fits nowhere."""
    found: Placed = []
    for component in adapter.components:
        if component not in models.components:
            raise AdapterError(f"it adapts {component}, which {models.name or 'the model'} does not have")
    for component, model in models.components.items():
        modules = {name.path: one for name, one in adapter.modules.items() if name.component == component}
        found += [(model.get_submodule(path), one) for path, one in match_to_model(model, component, modules).items()]
    return found


@torch.no_grad()
def fold(changes: Sequence[tuple[Placed, float]], originals: dict[Any, torch.Tensor] | None = None) -> None:
    """Set each weight to itself plus Σ multiplier · ΔW, summed in float32 and rounded once.

    originals: by layer, what to start from in place of the present weight; layers there that no change is for are set
    back to it.
    """
    by_layer: dict[Any, list[tuple[LowRank, float]]] = {layer: [] for layer in originals or {}}
    for place, multiplier in changes:
        for layer, one in place:
            by_layer.setdefault(layer, []).append((one, multiplier))
    for layer, ones in by_layer.items():
        weight = layer.weight if originals is None else originals[layer]
        total = weight.to(layer.weight.device, torch.float32)
        for one, multiplier in ones:
            if multiplier:
                delta = LowRank(one.down.to(total.device), one.up.to(total.device), one.alpha * multiplier).delta()
                total = total + delta.reshape(total.shape)
        layer.weight.copy_(total)
