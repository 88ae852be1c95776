"""Sorts the components of live adapters by size, so that the first b components are the best adapter of rank b."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from lora_adapters.convert.deltas.low_rank import LowRank
from lora_adapters.convert.deltas.svd import by_size
from lora_adapters.convert.errors import AdapterError
from lora_adapters.convert.formats.metadata import DyLora
from lora_adapters.types import registry
from lora_adapters.types.dylora.rank_controller import controllers, models_of
from lora_adapters.types.layers import factors, has_adapter, layers, low_rank
from lora_adapters.types.lycoris.layer import held

from . import optimizer_state
from .component_steps import Components, components_of, keep_bases, steps_of
from .hotswap import swap
from .injection import unwrapped
from .optimizer_state import averages_weights, check_restart, reset, restart


def sort_components(target: Any, optimizer: Any = None, adapter_name: str | None = None) -> None:
    """Replace the components of adapters in live models by those of their SVD, the largest first. ΔW stays the same.

    Each module's pair becomes up = U·√Σ and down = √Σ·Vᵀ, written into the same tensors. A plain LoRA becomes a DyLoRA
    of unit 1, which can be used at each rank: `set_rank(pipe, 4)` then gives the best approximation of rank 4. A DyLoRA
    keeps its unit, and has the scale of its full rank at every rank ("constant").

    When training with sort_at (see `DyLoraConfig`), call this function with the optimizer when `set_step` returns
    True. The optimizer's state belongs to the original components. The optimizer continues to step these, and the
    sorted components change accordingly (`component_steps`), so training of the full rank continues as if nothing had
    been sorted. An optimizer that averages weights (schedule-free) restarts instead: first moments become zero, second
    moments the mean of their tensor, and the learning rate should be warmed up again, for example over ten steps.

    Args:
        target: A pipeline, a model, or a list of models.
        optimizer: The optimizer that trains the adapters; None if none exists yet.
        adapter_name: The adapter; None for all LoRAs and DyLoRAs (adapters of other types are left unchanged).

    Raises:
        AdapterError: The adapter does not exist, does not consist only of low-rank pairs (DoRA, lora_bias, PEFT's
            variants), is fused, or the optimizer's state cannot be converted. Nothing is changed then.
    """
    adapters = list(_adapters(target, adapter_name))
    if not adapters:
        raise AdapterError(f"no LoRA {adapter_name or ''} was found whose components could be sorted")
    if adapter_name is None:
        adapters = [adapter for adapter in adapters if not _is_of_another_kind(*adapter)] or adapters
    for model, name in adapters:
        _check(model, name)
    parts = [
        part for model, name in adapters for _, layer in layers(model, name) for part in components_of(layer, name)
    ]
    with torch.no_grad(), _following(optimizer, parts):
        for model, name in adapters:
            _sort(model, name)


@contextmanager
def _following(optimizer: Any, parts: list[Components]) -> Iterator[None]:
    """A context in which components are sorted; the optimizer continues with them afterwards."""
    inner = optimizer_state.unwrapped(optimizer)
    if inner is None or averages_weights(inner):
        weights = [part.weight for part in parts]
        check_restart(inner, weights)
        with restart(inner, weights):
            yield
        return
    before = [part.weight.detach().clone() for part in parts]
    yield
    steps = steps_of(inner)
    steps.add(part for part in parts if not steps.has(part.weight))
    if lost := keep_bases(inner, parts, before):
        reset(inner, lost)


def _adapters(target: Any, adapter_name: str | None) -> Iterator[tuple[nn.Module, str]]:
    for model in map(unwrapped, models_of(target)):
        for name in getattr(model, "peft_config", {}):
            if adapter_name in (None, name) and any(has_adapter(module, name) for module in model.modules()):
                yield model, name


def _is_of_another_kind(model: nn.Module, name: str) -> bool:
    """Whether an adapter has changes that are not low-rank pairs."""
    return any(held(layer, name) is not None for _, layer in layers(model, name))


def _check(model: nn.Module, name: str) -> None:
    for path, layer in layers(model, name):
        if held(layer, name) is not None:
            raise AdapterError(f"{path} is not a LoRA in {name}: it has no components to sort")
        if more := registry.beyond_deltas(layer, name):
            raise AdapterError(f"{path} has {more} in {name}, with which components cannot be sorted")
        if name in layer.merged_adapters:
            raise AdapterError(f"{name} is fused into the weights: unfuse it first")
        if any(factor.weight.device.type == "meta" for factor in factors(layer, name)):
            raise AdapterError(f"{name} is offloaded, not in memory: sort its file with Adapter.sorted")


def _sort(model: nn.Module, name: str) -> None:
    config = model.peft_config[name]  # type: ignore[index,union-attr]
    own = controllers(model, name)
    if own and all(controller.dylora.rank_scaling == "constant" for controller in own):
        for _, layer in layers(model, name):
            _write(layer, name, by_size(low_rank(layer, name)))
        for controller in own:
            controller.unsorted = False
        return
    stabilized = bool(getattr(config, "use_rslora", False))
    pairs = {path: by_size(low_rank(layer, name, stabilized)) for path, layer in layers(model, name)}
    facts = registry.facts_of_config(config) if own else {"type": "DyLora", **asdict(DyLora())}
    swap(model, pairs, name, {**facts, "rank_scaling": "constant"})


def _write(layer: Any, name: str, pair: LowRank) -> None:
    """Write a pair's factors into an adapter's; padding stays zero."""
    down, up = factors(layer, name)
    down.weight.narrow(0, 0, pair.rank).copy_(pair.down)
    up.weight.narrow(1, 0, pair.rank).copy_(pair.up)
