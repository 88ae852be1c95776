"""Snapshots of what loading an adapter may change in a model, so that a failed load can be undone."""

from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from . import fusing, injection

_LOADED = "_hf_peft_config_loaded"  # checked by diffusers and transformers


@dataclass(frozen=True)
class _Layer:
    """The state of a PEFT layer: its active adapters and, if some are fused, their names, the weight and the bias."""

    active: list[str]
    merged: list[str]
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    caches: dict[str, Any]
    kept: Any

    @classmethod
    def of(cls, layer: Any) -> "_Layer":
        base = layer.get_base_layer()
        weight, bias = (
            part.detach().clone() if layer.merged_adapters and part is not None else None
            for part in (base.weight, getattr(base, "bias", None))
        )
        caches = dict(getattr(layer, "_caches", {}))
        kept = fusing.kept_of(layer)
        return cls(list(layer.active_adapters), list(layer.merged_adapters), weight, bias, caches, kept)

    def restore(self, layer: Any) -> None:
        layer.set_adapter(self.active)
        if self.weight is not None and layer.merged_adapters != self.merged:  # PEFT unmerges to add an adapter
            layer.get_base_layer().weight.data = self.weight
            if self.bias is not None:
                layer.get_base_layer().bias.data = self.bias
            layer.merged_adapters = list(self.merged)
            layer._caches = dict(self.caches)
            fusing.keep(layer, self.kept)


@dataclass(frozen=True)
class ModelState:
    """The adapters of a model, which of them are active or fused, and which parameters are trainable."""

    configs: dict[str, Any] | None
    loaded: bool | None
    layers: dict[Any, _Layer]
    trained: dict[nn.Parameter, bool]
    training: dict[nn.Module, bool]

    @classmethod
    def of(cls, model: Any) -> "ModelState":
        """The current state of a model."""
        configs = getattr(model, "peft_config", None)
        state = cls(None if configs is None else dict(configs), vars(model).get(_LOADED), {}, {}, {})
        for part in model.modules():
            state.training[part] = part.training
            for parameter in part._parameters.values():
                if parameter is not None:
                    state.trained[parameter] = parameter.requires_grad
            if isinstance(part, BaseTunerLayer):
                state.layers[part] = _Layer.of(part)
        return state

    def restore(self, model: Any) -> None:
        """Remove every adapter that was added since, and restore the rest."""
        known = self.configs or {}
        for name in _adapters_in(model) - known.keys():
            injection.take_out(model, name)
        for path, part in list(model.named_modules()):
            if isinstance(part, LoraLayer) and part not in self.layers:  # left empty by the failed load
                injection.unwrap(model, path, part)
        if self.configs is None:
            if hasattr(model, "peft_config"):
                del model.peft_config
        else:
            model.peft_config = dict(self.configs)
        for layer, state in self.layers.items():
            state.restore(layer)
        for parameter, needed in self.trained.items():
            parameter.requires_grad_(needed)
        for part, was in self.training.items():
            part.training = was
        if self.loaded is None:
            vars(model).pop(_LOADED, None)
        else:
            setattr(model, _LOADED, self.loaded)


def _adapters_in(model: nn.Module) -> set[str]:
    """The adapters of a model, from configs and layers, since a failed load may have created only one of the two."""
    names = set(getattr(model, "peft_config", None) or {})
    for module in model.modules():
        if isinstance(module, LoraLayer):
            names.update(name for held in injection.HELD for name in getattr(module, held, ()))
    return names
