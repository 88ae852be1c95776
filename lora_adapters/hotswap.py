"""Hot-swapping: replaces the weights of an adapter in place, so that a compiled model need not be compiled again.

PEFT's own hot-swapping treats any key that contains the adapter's name as one of its weights (so swapping "a" clears
other adapters too), rejects adapters whose alphas differ between modules, and leaves the old rank and alpha in the
layers, which the next `set_adapters` uses. So this module replaces it, for the denoiser and the text encoders. PEFT's
functions are redirected here if one of the two adapters belongs to this package.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft import LoraConfig

from lora_adapters.convert.deltas.base import Delta, with_article
from lora_adapters.convert.deltas.low_rank import LowRank
from lora_adapters.convert.errors import AdapterError
from lora_adapters.convert.formats.diffusers import pattern_value
from lora_adapters.types import registry
from lora_adapters.types.base import AdapterConfig, fields_beyond
from lora_adapters.types.layers import factors, layers, width
from lora_adapters.types.lycoris.config import TYPE as LYCORIS
from lora_adapters.types.lycoris.layer import held

from . import injection
from .compat import rank_stabilized
from .target_modules import RankAlpha

# Config fields that depend on the model and the layers, which do not change when weights are swapped.
_OF_THE_MODEL = ("base_model_name_or_path", "revision", "task_type", "inference_mode", "lora_dropout", "fan_in_fan_out")


def prepare(model: Any, adapter_name: str) -> None:
    """Prepare the first adapter after `pipe.enable_lora_hotswap(target_rank=...)`: pad it, and make its scale a tensor.

    Args:
        model: The model.
        adapter_name: The name of the adapter.

    Raises:
        AdapterError: The rank of the adapter is above target_rank.
    """
    options = getattr(model, "_prepare_lora_hotswap_kwargs", None)
    if options is None:
        return
    if _changes_of_other_kinds(model, adapter_name):  # these can only be swapped for changes of the same shapes
        model._prepare_lora_hotswap_kwargs = None
        return
    from peft.utils.hotswap import prepare_model_for_compiled_hotswap

    target, mine = options.get("target_rank"), [layer for _, layer in layers(model, adapter_name)]
    highest = max(layer.r[adapter_name] for layer in mine)
    if target is not None and highest > target:
        raise AdapterError(f"its rank {highest} is above the target_rank={target} of enable_lora_hotswap")
    prepare_model_for_compiled_hotswap(model, **options)
    model._prepare_lora_hotswap_kwargs = None
    registry.attach(model, adapter_name, model.peft_config[adapter_name])


def _changes_of_other_kinds(model: Any, adapter_name: str) -> list[str]:
    """The paths of the modules in which the adapter is not a plain LoRA."""
    return [path for path, layer in layers(model, adapter_name) if held(layer, adapter_name) is not None]


def check(model: Any, component: str, matched: Mapping[str, Delta], adapter_name: str) -> None:
    """Raise AdapterError if these changes cannot replace those of the adapter; nothing is changed."""
    if adapter_name not in getattr(model, "peft_config", {}):
        raise AdapterError(f"the {component} has no adapter {adapter_name} to swap: load it once without hotswap")
    present = dict(layers(model, adapter_name))
    for path, layer in present.items():
        more = registry.beyond_deltas(layer, adapter_name)
        if more is None and path not in matched and (weights := held(layer, adapter_name)) is not None:
            more = with_article(weights.change.kind)
        if more:
            raise AdapterError(f"{component}.{path} has {more} in {adapter_name}, which a swap would not replace")
    for path, change in matched.items():
        layer = present.get(path)
        if layer is None:
            raise AdapterError(f"{component}.{path} is not adapted by {adapter_name}, so it cannot be swapped")
        weights = held(layer, adapter_name)
        if not isinstance(change, LowRank) or weights is not None:
            if weights is None or not weights.is_like(change):
                now = "plain LoRA" if weights is None else repr(weights.change)
                raise AdapterError(
                    f"{component}.{path} is {now} in {adapter_name}, which cannot be swapped for another kind or "
                    f"shape, {change!r}"
                )
            continue
        room = width(layer, adapter_name)
        if _is_prepared(layer, adapter_name) and change.rank > room:
            raise AdapterError(
                f"{component}.{path} has rank {change.rank}, but the loaded adapter has room for {room}: call "
                f"enable_lora_hotswap(target_rank={change.rank}) before the first adapter is loaded"
            )
    if any(adapter_name in layer.merged_adapters for layer in present.values()):
        raise AdapterError(f"{adapter_name} is fused into the weights: unfuse it first")


@torch.no_grad()
def swap(model: Any, matched: Mapping[str, Delta], adapter_name: str, facts: Mapping[str, Any]) -> None:
    """Replace the changes of an adapter. Modules without a new change have no effect any more.

    The adapter keeps the weight that was set with `set_adapters`.

    Args:
        model: The model.
        matched: The changes, checked with `check`.
        adapter_name: The adapter's name in the model.
        facts: The new adapter's type and the type's own fields, as `types.registry.facts_of_metadata` returns them.
    """
    stabilized = bool(getattr(model.peft_config[adapter_name], "use_rslora", False))
    for path, layer in layers(model, adapter_name):
        pair: Any = matched.get(path)  # `check` ensures that this is a pair or None if the layer is plain LoRA
        if (weights := held(layer, adapter_name)) is not None:
            assert pair is not None, path  # ensured by `check`
            weights.replace(pair)
            continue
        down, up = factors(layer, adapter_name)
        if pair is None:
            up.weight.zero_()
            continue
        assert isinstance(pair, LowRank), path  # ensured by `check`
        weight = _weight(layer, adapter_name, stabilized)
        layer.r[adapter_name], layer.lora_alpha[adapter_name] = pair.rank, pair.alpha
        rank_stabilized(layer)[adapter_name] = False
        _rescale(layer, adapter_name, weight * pair.alpha / pair.rank)
        prepared = _is_prepared(layer, adapter_name)
        _put(down, pair.down, 0, prepared)
        _put(up, pair.up, 1, prepared)
    mine = {
        path: RankAlpha(layer.r[adapter_name], layer.lora_alpha[adapter_name])
        for path, layer in layers(model, adapter_name)
    }
    if _changes_of_other_kinds(model, adapter_name):
        facts = {"type": LYCORIS.name}
    _update_config(model, adapter_name, registry.config_options(mine, facts))
    registry.attach(model, adapter_name, model.peft_config[adapter_name])


def _update_config(model: Any, adapter_name: str, options: dict[str, Any]) -> None:
    """Update the adapter's config to its new weights; the object is kept if the type does not change.

    Compiled code depends on the type of the config.
    """
    before, after = model.peft_config[adapter_name], registry.restored(LoraConfig(**options))
    same = registry.type_of(before).variant is registry.type_of(after).variant
    if isinstance(before, AdapterConfig) and same:
        before.decide({name: getattr(after, name) for name in options if name != "auto_mapping"})
        before.use_rslora = False
        for name in fields_beyond(type(after), AdapterConfig):
            setattr(before, name, getattr(after, name))
        return
    for name in _OF_THE_MODEL:
        setattr(after, name, getattr(before, name))
    model.peft_config[adapter_name] = after


def _is_prepared(layer: Any, adapter_name: str) -> bool:
    return isinstance(layer.scaling[adapter_name], torch.Tensor)


def _weight(layer: Any, adapter_name: str, stabilized: bool) -> float:
    """The adapter's weight from `set_adapters`; `stabilized` is used for PEFT 0.17, which does not store it."""
    rank, alpha = layer.r[adapter_name], layer.lora_alpha[adapter_name]
    own = alpha / rank**0.5 if rank_stabilized(layer).get(adapter_name, stabilized) else alpha / rank
    return float(layer.scaling[adapter_name]) / own if own else 1.0


def _rescale(layer: Any, adapter_name: str, scaling: float) -> None:
    if _is_prepared(layer, adapter_name):
        layer.scaling[adapter_name].fill_(scaling)
    else:
        layer.scaling[adapter_name] = scaling


def _put(part: Any, value: torch.Tensor, dim: int, prepared: bool) -> None:
    """Copy into the layer's weight, padded to its rank (at `dim`), if it is prepared; otherwise replace the weight."""
    weight, rank = part.weight, value.shape[dim]
    if weight.shape[dim] != rank and not prepared:
        weight.data = value.to(weight, copy=True).contiguous()
        return
    weight.narrow(dim, 0, rank).copy_(value)
    weight.narrow(dim, rank, weight.shape[dim] - rank).zero_()


# --- PEFT's own functions --------------------------------------------------------------------------------------------


def preparing(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Replacement for `peft.utils.hotswap.prepare_model_for_compiled_hotswap` that keeps the types of adapters working.

    The configs of this package's adapters keep their ranks without padding. If a rank is above target_rank, the
    replacement raises AdapterError without changing anything.

    Args:
        stock: The original function.

    Returns:
        The replacement.
    """

    def prepare_model_for_compiled_hotswap(
        model: Any, *, target_rank: int | None = None, config: Any = None, **kwargs: Any
    ) -> None:
        inner = injection.unwrapped(model)
        for name in getattr(inner, "peft_config", {}):
            if others := _changes_of_other_kinds(inner, name):
                raise AdapterError(f"{others[0]} is not a plain LoRA in adapter {name}, so that it cannot be padded")
            highest = max((layer.r[name] for _, layer in layers(inner, name)), default=0)
            if registry.is_ours(inner, name) and target_rank is not None and highest > target_rank:
                raise AdapterError(f"adapter {name} has rank {highest}: use a target_rank of {highest} or more")
        configs = config if isinstance(config, dict) else {"": config} if config else {}
        theirs = {name: other for name, other in configs.items() if not isinstance(other, AdapterConfig)}
        stock(model, target_rank=target_rank, config=theirs or None, **kwargs)
        registry.refit(inner)

    return prepare_model_for_compiled_hotswap


def exchanging(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Replacement for `peft.utils.hotswap.hotswap_adapter_from_state_dict`, which PEFT and diffusers use.

    If the old or the new adapter belongs to this package, ranks, config and type of the new adapter replace the old
    ones too. If that is impossible, the replacement raises AdapterError without changing anything.

    Args:
        stock: The original function.

    Returns:
        The replacement.
    """

    def hotswap_adapter_from_state_dict(
        model: Any, state_dict: Mapping[str, torch.Tensor], adapter_name: str, config: Any, *args: Any, **kwargs: Any
    ) -> None:
        inner, arriving = injection.unwrapped(model), registry.restored(config)
        if not (registry.is_ours(inner, adapter_name) or isinstance(arriving, AdapterConfig)):
            stock(model, state_dict, adapter_name, config, *args, **kwargs)
            return
        matched = injection.match_to_model(inner, "model", _pairs(state_dict, adapter_name, arriving))
        check(inner, "model", matched, adapter_name)
        swap(inner, matched, adapter_name, registry.facts_of_config(arriving))

    return hotswap_adapter_from_state_dict


def _pairs(state_dict: Mapping[str, torch.Tensor], adapter_name: str, config: LoraConfig) -> dict[str, LowRank]:
    """The pairs of a state dict with PEFT's names; AdapterError if it contains anything else."""
    pattern = re.compile(rf"(?:base_model\.model\.)?(.+)\.lora_([AB])\.{re.escape(adapter_name)}\.weight")
    halves: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in state_dict.items():
        match = pattern.fullmatch(key)
        if match is None:
            raise AdapterError(f"{key} is not half of a low-rank pair of {adapter_name}: it cannot be swapped in")
        halves.setdefault(match[1].replace(".base_layer", ""), {})[match[2]] = tensor
    pairs = {}
    for path, half in halves.items():
        if len(half) != 2:
            raise AdapterError(f"{path} is incomplete: it has only lora_{next(iter(half))}")
        rank = pattern_value(config.rank_pattern or {}, path, config.r)
        alpha = pattern_value(config.alpha_pattern or {}, path, config.lora_alpha)
        scale = alpha / (math.sqrt(rank) if config.use_rslora else rank)
        pairs[path] = LowRank(half["A"], half["B"], scale * half["A"].shape[0])
    return pairs
