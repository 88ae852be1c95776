"""Fast injection of LoRA layers at known paths, without PEFT's repeated searches of the model.

PEFT finds the layers of a new adapter by iterating over all modules several times, and creates each layer by trying a
dozen backends. If the layers are known and are torch's own, all results for one shape are equal. So PEFT creates only
one layer of each shape (a `_Pattern`), and the others are copies of it. Everything unusual is left to PEFT.
"""

import warnings
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from lora_adapters.types.found_layers import outer_modules
from lora_adapters.types.lycoris.norm_layer import NormLayer
from lora_adapters.types.lycoris.operations import NORMS

from .target_modules import RankAlpha

_PATTERN = "pattern"  # the name of the adapter in patterns
_OF_QUANTISED = ("is_loaded_in_8bit", "is_loaded_in_4bit", "hf_quantizer", "_device_mesh")
_TIED = ("embed_tokens", "lm_head")  # PEFT checks whether these are tied to each other


# --- copies of what PEFT makes -----------------------------------------------------------------------------------


def _copied(value: Any) -> Any:
    """A copy of a module's attribute: containers are copied, other objects are shared."""
    if type(value) in (dict, OrderedDict):
        return type(value)((key, _copied(item)) for key, item in value.items()) if value else type(value)()
    if type(value) in (list, set):
        return type(value)(map(_copied, value)) if value else type(value)()
    return value


def _clone(module: nn.Module, base: nn.Module | None = None) -> Any:
    """A copy of a module and its submodules, around `base`; parameters are shared with the original."""
    new = object.__new__(type(module))
    state = new.__dict__
    for name, value in vars(module).items():
        if name != "_modules":
            state[name] = _copied(value)
    parts = {name: base if part is None else _clone(part) for name, part in module._modules.items()}
    state["_modules"] = type(module._modules)(parts)
    return new


class _Pattern(NamedTuple):
    """A layer created by PEFT: the layer without adapters, and the parts that an adapter adds, by attribute."""

    bare: Any
    added: dict[str, Any]

    def layer(self, base: nn.Module, path: str) -> Any:
        """A new layer around `base`."""
        layer = _clone(self.bare, base)
        if "target_name" in getattr(layer, "kwargs", ()):
            layer.kwargs["target_name"] = path
        return layer

    def add(self, layer: Any, adapter_name: str, decided: RankAlpha) -> None:
        """Add an adapter to a layer; its weights are on the meta device until they are set."""
        for name, template in self.added.items():
            template = _clone(template) if isinstance(template, nn.Module) else _copied(template)
            getattr(layer, name)[adapter_name] = template
        if isinstance(layer, NormLayer):  # it has no factors
            return
        layer.r[adapter_name], layer.lora_alpha[adapter_name] = decided.rank, decided.alpha
        layer.scaling[adapter_name] = decided.alpha / decided.rank
        kind = "channels" if isinstance(layer, lora.Conv2d) else "features"
        setattr(layer.lora_A[adapter_name], f"out_{kind}", decided.rank)
        setattr(layer.lora_B[adapter_name], f"in_{kind}", decided.rank)


def _pattern_of(base: nn.Module) -> _Pattern | None:
    """The pattern for layers like this one; None if PEFT may create another class of layer for it."""
    if type(base) not in (nn.Linear, nn.Conv2d, *NORMS) or type(base.weight) is not nn.Parameter:
        return None
    if not base.weight.is_floating_point() or getattr(base, "_hf_tp_plan", None) is not None:
        return None
    if isinstance(base, nn.Linear):
        return _made(nn.Linear, base.in_features, base.out_features)
    if isinstance(base, nn.LayerNorm):
        return _made(nn.LayerNorm, base.normalized_shape)
    if isinstance(base, nn.GroupNorm):
        return _made(nn.GroupNorm, base.num_groups, base.num_channels)
    if base.groups != 1:
        return None
    shape = (base.in_channels, base.out_channels, base.kernel_size, base.stride, base.padding, base.dilation)
    return _made(nn.Conv2d, *shape, padding_mode=base.padding_mode)


@cache
def _made(kind: type, *shape: Any, **options: Any) -> _Pattern:
    """Let PEFT create a layer of a shape."""
    holder = nn.Module()
    config = LoraConfig(r=1, lora_alpha=1, target_modules=["layer"])
    config._register_custom_module(dict.fromkeys(NORMS, NormLayer))
    # PEFT's low_cpu_mem_usage is not used, since it patches torch.nn.Module for all threads.
    with torch.device("meta"):
        holder.layer = kind(*shape, **options)
        inject_adapter_in_model(config, holder, adapter_name=_PATTERN, low_cpu_mem_usage=False)
    layer: Any = holder.layer
    # `adapter_layer_names` and `other_param_names` are incomplete: some versions omit `lora_bias` and `use_dora`.
    attributes = {**vars(layer), **layer._modules}
    holders = [name for name, value in attributes.items() if hasattr(value, "keys") and _PATTERN in value]
    added = {name: getattr(layer, name)[_PATTERN] for name in holders}
    for name in holders:
        del getattr(layer, name)[_PATTERN]
    layer._modules["base_layer"] = None  # keeps its position among the modules
    return _Pattern(layer, added)


@cache
def _keeps_gradients() -> bool:
    """Whether PEFT does not change requires_grad of other parameters, as in its newer versions."""
    holder: Any = nn.Module()
    holder.layer = nn.Linear(1, 1, device="meta")
    for name in ("first", "second"):
        config = LoraConfig(r=1, lora_alpha=1, target_modules=["layer"])
        with warnings.catch_warnings():  # the warning that the model already has an adapter
            warnings.simplefilter("ignore")
            with torch.device("meta"):
                inject_adapter_in_model(config, holder, adapter_name=name, low_cpu_mem_usage=False)
    return all(parameter.requires_grad for parameter in holder.layer.lora_A["first"].parameters())


# --- models ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """The place of one layer of an adapter: an existing PEFT layer, or the layer to wrap."""

    pattern: _Pattern
    parent: nn.Module
    name: str
    target: nn.Module


@dataclass(frozen=True)
class Places:
    """The places of the layers of an adapter in a model, by path, and the rest of the model."""

    by_path: dict[str, Place]
    modules: list[nn.Module]
    layers: list[Any]

    def put(self, adapter_name: str, decided: Mapping[str, RankAlpha]) -> None:
        """Create the adapter's layers, without weights yet, and make it the only active adapter, as PEFT does.

        Args:
            adapter_name: The adapter's name, which must be unused in the model.
            decided: Rank and alpha of each layer, by path.
        """
        layers = list(self.layers)
        for path, place in self.by_path.items():
            layer = place.target
            if not isinstance(layer, BaseTunerLayer):
                layer = place.pattern.layer(place.target, path)
                setattr(place.parent, place.name, layer)
                layers.append(layer)
            place.pattern.add(layer, adapter_name, decided[path])
        active = [adapter_name]
        keeps = _keeps_gradients()
        for layer in layers:
            if keeps:
                layer._active_adapter = active
            else:
                layer.set_adapter(active)
        if not (keeps and self.layers):
            for module in self.modules:
                for parameter in module._parameters.values():
                    if parameter is not None:
                        parameter.requires_grad = False


def places(model: nn.Module, paths: Collection[str]) -> Places | None:
    """Find the layers that get an adapter.

    Args:
        model: The model.
        paths: The paths of the layers in the model without PEFT.

    Returns:
        The places; None if anything in the model is unusual, so that PEFT must inject the adapter.
    """
    if any(getattr(model, name, None) for name in _OF_QUANTISED) or hasattr(model, "quantization_config"):
        return None
    if any(getattr(config, "kasa_config", None) for config in getattr(model, "peft_config", {}).values()):
        return None
    by_path, modules, layers = dict[str, nn.Module](), list[nn.Module](), list[Any]()
    for path, module in outer_modules(model):
        if isinstance(module, AuxiliaryTrainingWrapper):
            return None
        if isinstance(module, BaseTunerLayer):
            if not isinstance(module, lora.LoraLayer) or module.merged or getattr(module, "lora_arrow", None):
                return None
            layers.append(module)
        by_path[path] = module
        modules.append(module)
    placed = {}
    for path in paths:
        parent, _, name = path.rpartition(".")
        target, around = by_path.get(path), by_path.get(parent)
        if target is None or around is None or name in _TIED:
            return None
        if isinstance(target, BaseTunerLayer) and type(target) not in (lora.Linear, lora.Conv2d, NormLayer):
            return None
        base: Any = target.base_layer if isinstance(target, BaseTunerLayer) else target
        pattern = _pattern_of(base)
        if pattern is None:
            return None
        placed[path] = Place(pattern, around, name, target)
    return Places(placed, modules, layers)
