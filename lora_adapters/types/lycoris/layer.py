"""Changes of any kind in a live layer: a PEFT variant of a LoRA layer, whose parameters are the change's tensors."""

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
    """y = f(x; W, b) + f(x; ΔW, Δb), where a `DeltaWeights` in the layer's `lora_A` computes ΔW and Δb.

    f is the layer's operation: a linear map, a convolution or a normalisation. ΔW is not computed if using its factors
    is faster (`factored`). The weight of the adapter (PEFT's `scaling`) is LyCORIS' multiplier; at 0 nothing changes. W
    is the weight of the innermost layer, without any adapter, and gets no gradient.
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
        """The weight with the change added; the bias is changed in place. ValueError if values are not finite."""
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
        """The weight before the change was added; the bias is restored in place."""
        kept = module._caches.pop(before_key(active_adapter))
        if kept["bias"] is not None:
            module.get_base_layer().bias.data.copy_(kept["bias"])
        if kept["weight"] is not None:
            return kept["weight"].to(orig_weight)
        change, _ = _computed(module, active_adapter, kept["multiplier"], orig_weight)
        return orig_weight.data if change is None else (computable(orig_weight.data) - change).to(orig_weight.dtype)

    def _merged(self, module: Any, adapter: str, orig_weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The weight with the change added, as a new tensor, and the bias; None if it does not change.

        Values that cannot be recomputed by `unmerge` are kept.
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
    """The module with the adapter's change in a LoRA layer; None if the layer computes plain LoRA."""
    if adapter_name not in layer.lora_A:
        return None
    weights = layer.lora_A[adapter_name]
    return weights if isinstance(weights, DeltaWeights) else None


def hold(layer: Any, adapter_name: str, change: Delta, dtype: torch.dtype | None = None) -> None:
    """Replace an adapter's factors in a LoRA layer by a change of any kind.

    The tensors of the change become parameters, which are trainable if the factors were. To train a new adapter, inject
    it with a `LycorisConfig` and then set the initial change of each of its layers
    (`types.layers.layers(model, adapter_name)`). `layer.lora_A[adapter_name].parameters()` are the parameters for an
    optimizer, and `layer.lora_A[adapter_name].change` is the change with its current tensors.

    Args:
        layer: A LoRA layer that has the adapter: PEFT's for a linear layer or convolution, or `NormLayer`.
        adapter_name: The adapter's name.
        change: The change, which fits the layer's weight, with its final device and dtype.
        dtype: The model's dtype, if tensors of the change may stay in another one (see `DeltaWeights`).
    """
    trained = [parameter.requires_grad for parameter in layer.lora_A[adapter_name].parameters()]
    weights = DeltaWeights(change, dtype).requires_grad_(all(trained))
    weights.training = layer.training  # the mode of the layer, which PEFT sets for new layers too
    layer.lora_A[adapter_name], layer.lora_B[adapter_name] = weights, nn.Identity()
    layer.lora_variant[adapter_name] = DeltaVariant()
    layer.r[adapter_name], layer.lora_alpha[adapter_name], layer.scaling[adapter_name] = 1, 1.0, 1.0


def before_key(adapter_name: str) -> str:
    """The key in a layer's `_caches` for the values that fusing the adapter overwrote."""
    return f"{adapter_name}-before"


@torch.no_grad()
def _computed(
    module: Any, adapter: str, multiplier: float, weight: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """ΔW and Δb for a layer with this weight, which includes fused adapters."""
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
    module._caches.update(caches)  # PEFT's variants remove them
    return weight
