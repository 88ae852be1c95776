"""Hot-swapping: other weights in the place of an adapter's, in place, so that a compiled model stays compiled.

PEFT's own hot-swapping takes any key that contains the adapter's name for one of its weights (swapping "a" would empty
all others), refuses adapters whose alphas differ between modules, and leaves the layers with the old rank and alpha, on
which the next `set_adapters` builds. So it is done here, for the U-Net and the text encoders.
"""

from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig

from lora_adapters.convert.errors import AdapterError
from lora_adapters.convert.low_rank import LowRank
from lora_adapters.convert.metadata import DyLora

from . import dylora, placing, seams
from .config import restored
from .coverage import RankAlpha
from .dylora import layers


def prepare(model: Any, adapter_name: str) -> None:
    """After `pipe.enable_lora_hotswap(target_rank=...)`, make the first adapter ready: padded, its scale a tensor.

    AdapterError where the adapter's rank is above target_rank.
    """
    options = getattr(model, "_prepare_lora_hotswap_kwargs", None)
    if options is None:
        return
    from peft.utils.hotswap import prepare_model_for_compiled_hotswap

    target, mine = options.get("target_rank"), [layer for _, layer in layers(model, adapter_name)]
    highest = max(layer.r[adapter_name] for layer in mine)
    if target is not None and highest > target:
        raise AdapterError(f"its rank is {highest}: enable_lora_hotswap was called with target_rank={target}")
    prepare_model_for_compiled_hotswap(model, **options)
    model._prepare_lora_hotswap_kwargs = None
    facts = placing.dylora_in(model, adapter_name)
    if facts is not None:
        dylora.attach(model, adapter_name, facts)


def check(model: Any, component: str, placed: Mapping[str, LowRank], adapter_name: str) -> None:
    """AdapterError where these pairs cannot take the adapter's place; nothing is changed."""
    if adapter_name not in getattr(model, "peft_config", {}):
        raise AdapterError(
            f"there is no adapter {adapter_name} to swap in the {component}: load it once without hotswap"
        )
    present = dict(layers(model, adapter_name))
    for path, layer in present.items():
        if more := placing.beyond_lora(layer, adapter_name):
            raise AdapterError(f"{component}.{path} has {more} in {adapter_name}, which a swap would leave behind")
    for path, one in placed.items():
        layer = present.get(path)
        if layer is None:
            raise AdapterError(f"{component}.{path} is not adapted by {adapter_name}: only what is can be swapped")
        room = layer.lora_A[adapter_name].weight.shape[0]
        if _is_prepared(layer, adapter_name) and one.rank > room:
            raise AdapterError(
                f"{component}.{path} has rank {one.rank}, there is room for {room}: call "
                f"enable_lora_hotswap(target_rank={one.rank}) before the first adapter is loaded"
            )
    if any(adapter_name in layer.merged_adapters for layer in present.values()):
        raise AdapterError(f"{adapter_name} is fused into the weights: unfuse it first")


@torch.no_grad()
def swap(model: Any, placed: Mapping[str, LowRank], adapter_name: str, facts: DyLora | None) -> None:
    """Put the pairs (checked) where the adapter's are; its modules without a pair do nothing from then on.

    The weight that `set_adapters` has given to the adapter stays.
    """
    for path, layer in layers(model, adapter_name):
        one = placed.get(path)
        down, up = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
        if one is None:
            up.weight.zero_()
            continue
        weight = _weight(layer, adapter_name)
        layer.r[adapter_name], layer.lora_alpha[adapter_name] = one.rank, one.alpha
        seams.rank_stabilized(layer)[adapter_name] = False
        _rescale(layer, adapter_name, weight * one.alpha / one.rank)
        _put(down, one.down, 0)
        _put(up, one.up, 1)
    mine = {
        path: RankAlpha(layer.r[adapter_name], layer.lora_alpha[adapter_name])
        for path, layer in layers(model, adapter_name)
    }
    model.peft_config[adapter_name] = restored(LoraConfig(**placing.plain_config(mine, facts)))
    if facts is None:
        dylora.detach(model, adapter_name)
    else:
        dylora.attach(model, adapter_name, facts)


def _is_prepared(layer: Any, adapter_name: str) -> bool:
    return isinstance(layer.scaling[adapter_name], torch.Tensor)


def _weight(layer: Any, adapter_name: str) -> float:
    """What `set_adapters` multiplies the adapter with in this layer."""
    rank, alpha = layer.r[adapter_name], layer.lora_alpha[adapter_name]
    own = alpha / rank**0.5 if seams.rank_stabilized(layer).get(adapter_name) else alpha / rank
    return float(layer.scaling[adapter_name]) / own if own else 1.0


def _rescale(layer: Any, adapter_name: str, scaling: float) -> None:
    if _is_prepared(layer, adapter_name):
        layer.scaling[adapter_name].fill_(scaling)
    else:
        layer.scaling[adapter_name] = scaling


def _put(part: Any, value: torch.Tensor, dim: int) -> None:
    """Copy into the layer's weight, whose rank (at `dim`) may be larger; a smaller one is replaced."""
    weight, rank = part.weight, value.shape[dim]
    if weight.shape[dim] < rank:  # never of a prepared adapter
        weight.data = value.to(weight, copy=True).contiguous()
        return
    weight.narrow(dim, 0, rank).copy_(value)
    weight.narrow(dim, rank, weight.shape[dim] - rank).zero_()
