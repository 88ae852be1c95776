"""Changes of any kinds in a live layer: a PEFT variant of a LoRA layer, whose factors are a change's tensors."""

from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import LoraVariant
from torch import nn

from lora_adapters.convert.deltas.base import Delta

from .factored import applied_in_factors
from .operations import applied, base_weight, computable, weight_shape
from .weights import DeltaWeights


class DeltaVariant(LoraVariant):
    """y = f(x; W, b) + f(x; ΔW, Δb), where a `DeltaWeights` in the layer's `lora_A` makes ΔW and Δb.

    f is what the layer computes: a linear map, a convolution, a normalisation. ΔW is not made where its factors are
    quicker (`factored`). The weight of the adapter (PEFT's
    `scaling`) is what LyCORIS calls the multiplier; at 0 nothing changes. W is that of the innermost layer without any
    adapter. It takes no part in the gradient.
    """

    def forward(  # type: ignore[override]
        self, module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """result + f(x; ΔW, Δb)."""
        base, multiplier = module.get_base_layer(), float(module.scaling[active_adapter])
        if multiplier == 0:
            return result
        weights = module.lora_A[active_adapter]
        inputs = module.lora_dropout[active_adapter](x)
        if not (weights.change.needs_base or weights.is_altered):
            quick = weights.applied(multiplier, partial(applied_in_factors, base, inputs))
            if quick is not None:
                return result + quick
        own = base_weight(base, x.device) if weights.change.needs_base else None
        weight, bias = weights(weight_shape(base), multiplier, own, torch.promote_types(x.dtype, torch.float32))
        weight, bias = (None if part is None else part.to(x.dtype) for part in (weight, bias))
        return result + applied(base, inputs, weight, bias)

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        """Nothing to prepare: see `hold`."""

    # --- fusing ------------------------------------------------------------------------------------------------------

    def merge_safe(self, module: Any, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """The weight with the change added; the bias is changed in place. ValueError if numbers are not finite."""
        weight, bias = self._merged(module, active_adapter, orig_weight)
        for part in (weight, bias):
            if part is not None and not torch.isfinite(part).all():
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {active_adapter} seems to be broken"
                )
        self._put_bias(module, bias)
        return weight

    def merge_unsafe(self, module: Any, active_adapter: str, orig_weight: torch.Tensor) -> None:  # type: ignore[override]
        """Add the change in place, to the bias too."""
        weight, bias = self._merged(module, active_adapter, orig_weight)
        orig_weight.data.copy_(weight)
        self._put_bias(module, bias)

    def unmerge(self, module: Any, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """The weight as it was before the change was added; the bias is changed back in place."""
        kept = module._caches.pop(before_key(active_adapter))
        if kept["bias"] is not None:
            module.get_base_layer().bias.data.copy_(kept["bias"])
        if kept["weight"] is not None:
            return kept["weight"].to(orig_weight)
        change, _ = _computed(module, active_adapter, kept["multiplier"], orig_weight)
        return orig_weight.data if change is None else (computable(orig_weight.data) - change).to(orig_weight.dtype)

    def _merged(self, module: Any, adapter: str, orig_weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The weight with the change added, a new tensor, and the bias; None if that stays.

        What cannot be computed backwards is kept for `unmerge`.
        """
        multiplier, base = float(module.scaling[adapter]), module.get_base_layer()
        if multiplier == 0:
            weight, bias = None, None
        else:
            weight, bias = _computed(module, adapter, multiplier, orig_weight)
        exact = weight is not None and (module.lora_A[adapter].change.needs_base or weight.ndim == 1)
        module._caches[before_key(adapter)] = {
            "multiplier": multiplier,
            "weight": orig_weight.detach().clone() if exact else None,
            "bias": None if bias is None else base.bias.detach().clone(),
        }
        if bias is not None:
            bias = (computable(base.bias.detach()) + bias.to(base.bias.device)).to(base.bias.dtype)
        if weight is None:
            return orig_weight.detach(), bias
        return (computable(orig_weight.detach()) + weight).to(orig_weight.dtype), bias

    @staticmethod
    def _put_bias(module: Any, bias: torch.Tensor | None) -> None:
        if bias is not None:
            module.get_base_layer().bias.data.copy_(bias)


def held(layer: Any, adapter_name: str) -> DeltaWeights | None:
    """What holds the adapter's change in a LoRA layer; None if the layer computes it from LoRA's factors."""
    if adapter_name not in layer.lora_A:
        return None
    weights = layer.lora_A[adapter_name]
    return weights if isinstance(weights, DeltaWeights) else None


def hold(layer: Any, adapter_name: str, change: Delta, dtype: torch.dtype | None = None) -> None:
    """Make an adapter be a change of any kind in a LoRA layer, in the place of its factors there.

    The tensors of the change become parameters that are trained where the factors before were. To train a new adapter,
    inject it with a `LycorisConfig` and then give each of its layers (`types.layers.layers(model, adapter_name)`) the
    change to begin with; `layer.lora_A[adapter_name].parameters()` are what an optimizer takes, and
    `layer.lora_A[adapter_name].change` is the change with its present tensors.

    Args:
        layer: A LoRA layer that has the adapter: PEFT's for a linear layer or convolution, `NormLayer`.
        adapter_name: The adapter's name.
        change: Its change, which fits the layer's weight, on the device and in the dtype that it is to have.
        dtype: The model's, where tensors of the change may wait in another (see `DeltaWeights`).
    """
    trained = [parameter.requires_grad for parameter in layer.lora_A[adapter_name].parameters()]
    weights = DeltaWeights(change, dtype).requires_grad_(all(trained))
    weights.training = layer.training  # as PEFT leaves new layers, also of models that nobody trains
    layer.lora_A[adapter_name], layer.lora_B[adapter_name] = weights, nn.Identity()
    layer.lora_variant[adapter_name] = DeltaVariant()
    layer.r[adapter_name], layer.lora_alpha[adapter_name], layer.scaling[adapter_name] = 1, 1.0, 1.0


def before_key(adapter_name: str) -> str:
    """The key in a layer's `_caches` of what was overwritten when the adapter was fused."""
    return f"{adapter_name}-before"


@torch.no_grad()
def _computed(
    module: Any, adapter: str, multiplier: float, weight: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """ΔW and Δb for a layer whose weight is this one, with what is fused into it."""
    weight = computable(weight)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    weights = module.lora_A[adapter]
    own = _without_fused(module, weight).to(weights.weight.device) if weights.change.needs_base else None
    change, bias = weights(tuple(weight.shape), multiplier, own, dtype)
    return None if change is None else change.to(weight.device), bias


def _without_fused(module: Any, weight: torch.Tensor) -> torch.Tensor:
    """The weight without the adapters that are fused into it."""
    caches = dict(module._caches)
    weight = computable(weight.detach())
    for name in reversed(module.merged_adapters):
        if name not in module.lora_A:
            continue
        variant = module.lora_variant.get(name)
        if variant is None:
            weight = weight - module.get_delta_weight(name).to(weight)
        elif isinstance(variant, DeltaVariant):
            kept = module._caches[before_key(name)]
            if kept["weight"] is not None:
                weight = kept["weight"].to(weight)
            else:
                change, _ = _computed(module, name, kept["multiplier"], weight)
                weight = weight if change is None else (weight - change).to(weight.dtype)
        else:
            weight = variant.unmerge(module, name, weight)
    module._caches.clear()
    module._caches.update(caches)  # which PEFT's variants take out of it
    return weight
