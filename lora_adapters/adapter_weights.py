"""Fixes for the weights of adapters in diffusers: a scale of 0 for one call, and weights of single blocks."""

import functools
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch

from lora_adapters.convert.errors import AdapterError
from lora_adapters.convert.suggestions import closest

Function = Callable[..., Any]
_HELD = "_lora_adapters_scaling"  # the attribute of a layer at scale 0 with the previous scaling of each adapter


def scaling(stock: Function) -> Function:
    """Wraps `scale_lora_layers` of diffusers: the scaling that a scale of 0 overwrites is kept for `unscaling`."""

    def scale_lora_layers(model: Any, weight: float) -> None:
        if weight == 0:
            for layer in _layers(model):
                held = vars(layer).setdefault(_HELD, {})
                for name in layer.active_adapters:
                    value = layer.scaling.get(name, 0)
                    if value != 0:  # it may already be 0, for example after a call that failed
                        held[name] = float(value)
        stock(model, weight)

    return scale_lora_layers


def unscaling(stock: Function) -> Function:
    """Replacement for `unscale_lora_layers` of diffusers: after a scale of 0 each layer gets its previous scaling back.

    The original sets the weight to 1, regardless of `set_adapters`.

    Args:
        stock: The original function.

    Returns:
        The replacement.
    """

    def unscale_lora_layers(model: Any, weight: float | None = None) -> None:
        if weight is None or weight != 0:
            stock(model, weight)
            return
        from peft.tuners.lora.layer import LoraLayer
        from peft.tuners.tuners_utils import BaseTunerLayer

        for layer in _layers(model):
            for name, value in vars(layer).pop(_HELD, {}).items():
                if isinstance(layer.scaling.get(name), torch.Tensor):  # the adapter is prepared for hot-swapping
                    layer.scaling[name].fill_(value)
                elif name in layer.scaling:
                    layer.scaling[name] = value
        for layer in model.modules():
            if isinstance(layer, BaseTunerLayer) and not isinstance(layer, LoraLayer):
                for name in layer.active_adapters:
                    layer.set_scale(name, 1.0)  # type: ignore[attr-defined]

    return unscale_lora_layers


def _layers(model: Any) -> Any:
    from lora_adapters.types.found_layers import lora_layers

    return (layer for _, layer in lora_layers(model))


def activating(stock: Function) -> Function:
    """Replacement for `set_weights_and_activate_adapters` of diffusers that does not search the model for its layers.

    The weight of an adapter that is prepared for hot-swapping stays a tensor, so that a compiled model sees it change.

    Args:
        stock: The original function, which is called if the model has layers of other classes than PEFT's plain LoRA.

    Returns:
        The replacement.
    """

    def set_weights_and_activate_adapters(model: Any, adapter_names: Any, weights: Sequence[Any]) -> None:
        from peft.tuners.lora import Conv2d, Linear

        from lora_adapters.types.found_layers import tuner_layers

        layers = tuner_layers(model)
        if isinstance(adapter_names, str) or any(type(layer) not in (Linear, Conv2d) for _, layer in layers):
            stock(model, adapter_names, weights)
            return
        chosen, scales = set(adapter_names), list(zip(adapter_names, weights, strict=False))
        single = not any(isinstance(weight, dict) for weight in weights)
        for path, layer in layers:
            _activate(layer, adapter_names, chosen)
            scaling, set_scale = layer.scaling, layer.set_scale
            for name, weight in scales:
                before = scaling.get(name)
                set_scale(name, weight if single or not isinstance(weight, dict) else _weight_at(path, weight))
                if isinstance(before, torch.Tensor):
                    scaling[name] = before.fill_(float(scaling[name]))

    return set_weights_and_activate_adapters


def _activate(layer: Any, adapter_names: list[str], chosen: set[str]) -> None:
    """The same as `layer.set_adapter`, but faster for layers that have only LoRA factors."""
    inside = layer._modules
    if inside["lora_magnitude_vector"]._modules or getattr(layer, "frozen_peft_weight_names", None):
        layer.set_adapter(adapter_names)
        return
    for held in (inside["lora_A"], inside["lora_B"]):
        for name, part in held._modules.items():
            trainable = name in chosen
            if part._modules:  # the factor is wrapped by another module
                part.requires_grad_(trainable)
            for parameter in part._parameters.values():
                if parameter is not None and parameter.requires_grad is not trainable and parameter.is_leaf:
                    parameter.requires_grad = trainable
    vars(layer)["_active_adapter"] = adapter_names  # avoids the slow __setattr__ of torch.nn.Module


def _weight_at(path: str, weights: Mapping[str, float]) -> float:
    """The weight of the layer at a path, looked up by parts of the path and by blocks with attention; 1 by default."""
    for part, weight in weights.items():
        if part in path:
            return weight
    parts = path.split(".")
    return weights.get(f"{parts[0]}.{parts[1]}.attentions.{parts[3]}", 1.0) if len(parts) > 3 else 1.0


def replace_everywhere(home: ModuleType, name: str, wrapper: Callable[[Function], Function]) -> None:
    """Replace a function of a module by a wrapper, also in modules that have imported it under the same name."""
    stock = getattr(home, name)
    if hasattr(stock, "stock"):
        return
    ours: Any = functools.wraps(stock)(wrapper(stock))
    ours.stock = stock
    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get(name) is stock:
            setattr(module, name, ours)


def checking_blocks(stock: Function) -> Function:
    """Wraps `_maybe_expand_lora_scales_for_one_adapter`: AdapterError for a part or block that the U-Net lacks."""

    def _maybe_expand_lora_scales_for_one_adapter(
        scales: Any,
        blocks_with_transformer: Mapping[str, Sequence[int]],
        transformer_per_block: Mapping[str, int],
        model: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if isinstance(scales, dict):
            _check_names("the weights of an adapter", scales, ["down", "mid", "up"])
            for part, there in (("down", model.down_blocks), ("up", model.up_blocks)):
                if isinstance(scales.get(part), dict):
                    blocks = [f"block_{number}" for number in range(len(there))]
                    _check_names(f"the weights of an adapter's {part}", scales[part], blocks)
            for part, value in scales.items():
                _check_numbers(part, value)
        return stock(scales, blocks_with_transformer, transformer_per_block, model, *args, **kwargs)

    return _maybe_expand_lora_scales_for_one_adapter


def _check_names(where: str, named: Mapping[str, Any], known: Sequence[str]) -> None:
    for name in named:
        if name not in known:
            near = None if _word(name) in map(_word, known) else closest(str(name), known)
            hint = f"did you mean {near!r}?" if near else f"known names are {', '.join(known)}"
            raise AdapterError(f"unknown {name!r} in {where}; {hint}")


def _word(name: object) -> str:
    """A name without its number: `block_9` is not a misspelling of `block_1`."""
    return re.sub(r"\d+", "", str(name))


def _check_numbers(where: str, value: Any) -> None:
    """Raise AdapterError if a weight, or one in a list or in a dictionary of blocks, is not a number."""
    if isinstance(value, dict) and where in ("down", "up"):
        for block, weight in value.items():
            _check_numbers(f"{where}.{block}", weight)
    elif isinstance(value, list):
        for weight in value:
            _check_numbers(where, weight)
    elif value is None or isinstance(value, (str, Mapping)):
        raise AdapterError(f"the weight of an adapter's {where} is {value!r:.80}, which is not a number")
