"""DyLoRA's forward pass: a PEFT variant of a LoRA layer, gated by the rank controller of its model."""

import inspect
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora.layer import LoraVariant
from torch import nn

from lora_adapters.convert.deltas.low_rank import LowRank
from lora_adapters.convert.errors import AdapterError
from lora_adapters.types.layers import layers

if TYPE_CHECKING:
    from .rank_controller import RankController


def refuse_unfit(model: nn.Module, adapter_name: str) -> None:
    """Raise AdapterError if a layer already has a PEFT variant for the adapter, or does not support variants."""
    for path, layer in layers(model, adapter_name):
        variant = layer.lora_variant.get(adapter_name)
        if variant is not None and not isinstance(variant, DyLoraVariant):
            raise AdapterError(
                f"{path} has PEFT's {type(variant).__name__} in adapter {adapter_name}, which cannot be combined with "
                "DyLoRA: use only one of them"
            )
        if "lora_variant" not in inspect.unwrap(type(layer).forward).__code__.co_names:
            kind = f"{type(layer).__module__}.{type(layer).__name__}"
            raise AdapterError(
                f"{path} is a {kind}, a layer that computes plain LoRA only: DyLoRA cannot be used there"
            )


def _frozen_below(layer: Any, start: int, dim: int, x: torch.Tensor) -> torch.Tensor:
    """layer(x), with no gradient for the weight's first `start` slices of `dim`."""
    weight = layer.weight
    parts = [weight.narrow(dim, 0, start).detach(), weight.narrow(dim, start, weight.shape[dim] - start)]
    return torch.func.functional_call(layer, {"weight": torch.cat(parts, dim)}, (x,))


class DyLoraVariant(LoraVariant):
    """ΔW_b x = scale(b) · up[:, :b] · down[:b] · x, instead of a LoRA layer's alpha/r · up · down · x.

    Each layer has its own instance. The components from b on are multiplied by a gate of zeros between the two factors:
    the factors are called as modules, so that their hooks for offloading, sharding and quantisation keep working. The
    gate also contains the layer's scaling at the time when the adapter was attached. `full` is the layer's rank; its
    factors are wider if the adapter is padded for hot-swapping.
    """

    def __init__(self, controller: "RankController", layer: Any, adapter_name: str):
        self.controller = controller
        self.fit(layer, adapter_name)
        self.gate = torch.zeros(1, 0)
        controller.add(self)

    def fit(self, layer: Any, adapter_name: str, width: int | None = None) -> None:
        """Adopt the layer's current rank, width (by default that of its weight) and scaling."""
        weight = layer.lora_A[adapter_name].weight
        self.full, self.length = layer.r[adapter_name], weight.shape[0] if width is None else width
        self.trailing = weight.ndim - 2  # a convolution's channels are not last
        scaling = layer.scaling[adapter_name]
        # A tensor (in layers prepared for hot-swapping) is multiplied in at each call instead: a number here that
        # changes with the adapter would make a compiled model recompile.
        self.scaling = 1.0 if isinstance(scaling, torch.Tensor) else float(scaling) or 1.0

    @torch.compiler.disable
    def refit(self, layer: Any, adapter_name: str, width: int) -> None:
        """Adjust to a layer whose factors have been padded without notifying the controller."""
        self.fit(layer, adapter_name, width)
        self.controller.fill()

    def values(self, rank: int) -> torch.Tensor:
        """The gate at a rank: (length,), the factor of the scale for each component, with zeros from the rank on."""
        rank = min(rank, self.full)
        gate = torch.zeros(self.length)
        gate[:rank] = self.controller.factor(rank, self.full)
        return gate

    def forward(  # type: ignore[override]
        self, module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """result + ΔW_b x; x is (..., in) for linear layers, (batch, in, height, width) for convolutions."""
        down, up = module.lora_A[active_adapter], module.lora_B[active_adapter]
        x = module.lora_dropout[active_adapter](x)
        controller, start = self.controller, 0
        if controller.freezes_lower:
            start = min(controller.now[0], self.full) - controller.dylora.unit
        hidden = _frozen_below(down, start, 0, x) if start > 0 else down(x)
        length = hidden.shape[-1 - self.trailing]  # not from the weight, which may be sharded outside of its module
        if length != self.length:
            self.refit(module, active_adapter, length)
        gate = self.gate if len(controller.now) == 1 else self._of_samples(hidden)
        scaling = module.scaling[active_adapter]
        if isinstance(scaling, torch.Tensor) or scaling != self.scaling:  # the adapter's weight has been set since
            gate = gate * (scaling / self.scaling)
        hidden = hidden * gate.to(hidden, copy=True)  # copied, since the gradient needs the current values
        return result + (_frozen_below(up, start, 1, hidden) if start > 0 else up(hidden))

    def gate_of_all(self, module: Any, adapter: str) -> torch.Tensor | None:
        """The gate (length,) including the scaling; None if samples have different ranks, or in training."""
        width = module.lora_A[adapter].weight.shape[0]
        if self.controller.drawn or len(self.controller.now) != 1 or self.length != width:
            return None
        return self.gate.flatten() * (module.scaling[adapter] / self.scaling)

    def shaped(self, gate: torch.Tensor, dimensions: int) -> torch.Tensor:
        """Reshape a gate (samples or 1, length) to broadcast to activations with this number of dimensions."""
        if len(gate) == 1:
            return gate.view(-1, *[1] * self.trailing)
        if self.trailing:
            return gate.view(*gate.shape, *[1] * self.trailing)
        return gate.view(len(gate), *[1] * (dimensions - 2), -1)

    def _of_samples(self, hidden: torch.Tensor) -> torch.Tensor:
        """The gate if each sample has its own rank; AdapterError if the first dimension is not that of samples."""
        if len(self.gate) != len(hidden):
            raise AdapterError(
                f"a DyLoRA layer got the shape {list(hidden.shape)} in a batch of {len(self.gate)}: a rank for each "
                "sample requires that samples are the first dimension; use rank_sampling='uniform'"
            )
        return self.gate if self.gate.ndim == hidden.ndim else self.shaped(self.gate.flatten(1), hidden.ndim)

    def _delta(self, module: Any, adapter: str, weight: torch.Tensor) -> torch.Tensor:
        down, up = module.lora_A[adapter].weight.data, module.lora_B[adapter].weight.data
        rank = min(self.controller.rank, self.full)
        scale = float(module.scaling[adapter]) * self.controller.factor(rank, self.full)
        delta = LowRank(down[:rank].flatten(1), up[:, :rank].flatten(1), scale * rank).delta()
        delta = delta.T if getattr(module, "fan_in_fan_out", False) else delta.reshape(weight.shape)
        return delta.to(weight)

    def merge_safe(self, module: Any, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """The weight with the change of the current rank added."""
        return orig_weight + self._delta(module, active_adapter, orig_weight)

    def merge_unsafe(self, module: Any, active_adapter: str, orig_weight: torch.Tensor) -> None:  # type: ignore[override]
        """Add the change of the current rank in place."""
        orig_weight.data += self._delta(module, active_adapter, orig_weight)

    def unmerge(self, module: Any, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """The weight with the change of the current rank taken away."""
        return orig_weight.data - self._delta(module, active_adapter, orig_weight)

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        """Nothing to prepare: the factors are LoRA's own."""
