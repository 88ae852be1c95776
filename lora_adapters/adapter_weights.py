"""The weights of adapters as diffusers takes them: a scale of 0 for one call, and weights of single blocks."""

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
_HELD = "_lora_adapters_scaling"  # of a layer at scale 0: the scaling of each adapter before


def scaling(stock: Function) -> Function:
    """Of `scale_lora_layers`: what a scale of 0 wipes out is kept until `unscaling`."""

    def scale_lora_layers(model: Any, weight: float) -> None:
        if weight == 0:
            for layer in _layers(model):
                held = vars(layer).setdefault(_HELD, {})
                for name in layer.active_adapters:
                    value = layer.scaling.get(name, 0)
                    if value != 0:  # else it is 0 already, since a call that ended in an error perhaps
                        held[name] = float(value)
        stock(model, weight)

    return scale_lora_layers


def unscaling(stock: Function) -> Function:
    """Of `unscale_lora_layers`: after a scale of 0, each layer has the scaling again that it had before.

    diffusers' own sets the weight to 1, whatever `set_adapters` has set it to.
    """

    def unscale_lora_layers(model: Any, weight: float | None = None) -> None:
        if weight is None or weight != 0:
            stock(model, weight)
            return
        from peft.tuners.lora.layer import LoraLayer
        from peft.tuners.tuners_utils import BaseTunerLayer

        for layer in _layers(model):
            for name, value in vars(layer).pop(_HELD, {}).items():
                if isinstance(layer.scaling.get(name), torch.Tensor):  # of an adapter that is prepared to be swapped
                    layer.scaling[name].fill_(value)
                elif name in layer.scaling:
                    layer.scaling[name] = value
        for layer in model.modules():
            if isinstance(layer, BaseTunerLayer) and not isinstance(layer, LoraLayer):
                for name in layer.active_adapters:
                    layer.set_scale(name, 1.0)  # type: ignore[attr-defined]

    return unscale_lora_layers


def _layers(model: Any) -> Any:
    from peft.tuners.lora.layer import LoraLayer

    return (module for module in model.modules() if isinstance(module, LoraLayer))


def replace_everywhere(home: ModuleType, name: str, wrapper: Callable[[Function], Function]) -> None:
    """Put a wrapped function in the place of a module's, also under that name in modules that have imported it."""
    stock = getattr(home, name)
    if hasattr(stock, "stock"):
        return
    ours: Any = functools.wraps(stock)(wrapper(stock))
    ours.stock = stock
    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get(name) is stock:
            setattr(module, name, ours)


def checking_blocks(stock: Function) -> Function:
    """Of `_maybe_expand_lora_scales_for_one_adapter`: AdapterError for a part or block that is not in the U-Net."""

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


def _check_names(where: str, given: Mapping[str, Any], known: Sequence[str]) -> None:
    for name in given:
        if name not in known:
            near = None if _word(name) in map(_word, known) else closest(str(name), known)
            hint = f"did you mean {near!r}?" if near else f"there are {', '.join(known)}"
            raise AdapterError(f"unknown {name!r} in {where}; {hint}")


def _word(name: object) -> str:
    """A name without its number: `block_9` is no slip of `block_1`."""
    return re.sub(r"\d+", "", str(name))


def _check_numbers(where: str, value: Any) -> None:
    """AdapterError for a weight, or one in a list or in the table of a part's blocks, that is not a number."""
    if isinstance(value, dict) and where in ("down", "up"):
        for block, one in value.items():
            _check_numbers(f"{where}.{block}", one)
    elif isinstance(value, list):
        for one in value:
            _check_numbers(where, one)
    elif value is None or isinstance(value, (str, Mapping)):
        raise AdapterError(f"the weight of an adapter's {where} is {value!r:.80}, which is not a number")
