"""Computing several adapters of a layer as one: their factors are stacked, with their weights as a gate in between.

Σ sᵢ·upᵢ·downᵢ·x = [up₁ up₂ ...] · diag(s₁, ..., s₂, ...) · [down₁; down₂; ...] · x, which needs two products instead of
two for each adapter. The factors are concatenated in each call, which is cheap compared with the products and needs no
permanent memory, and nothing has to be updated when weights, ranks or adapters change.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lora_adapters.types.layers import Factors

Method = Callable[..., torch.Tensor]
_PLAIN = (nn.Linear, nn.Conv2d)


def stacked(stock: Method) -> Method:
    """Replacement for `forward` of PEFT's linear layers and convolutions that computes several adapters in one product.

    It applies to two or more active adapters that are plain low-rank pairs. The original is called for everything else:
    for mixed batches, for training (because of dropouts and gradients), and if the factors have offloading hooks.

    Args:
        stock: The original method.

    Returns:
        The replacement.
    """

    def forward(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not args and "input" in kwargs:  # AnimateDiff's motion modules use this keyword, which PEFT does not accept
            args = (kwargs.pop("input"),)
        return of_input(self, *args, **kwargs)

    def of_input(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        active = self._active_adapter
        if isinstance(active, str) or len(active) < 2 or kwargs or self._disable_adapters or self.merged_adapters:
            return stock(self, x, *args, **kwargs)
        stack = _stack(self, [name for name in active if name in self.lora_A], x)
        if stack is None:
            return stock(self, x, *args, **kwargs)
        down, up, gate = stack
        result = self.base_layer(x, *args)
        if x.dtype != down.dtype and getattr(self, "cast_input_dtype_enabled", True):
            x = x.to(down.dtype)
        if down.ndim == 2:
            hidden = F.linear(x, down)
            return (result + F.linear(hidden if gate is None else hidden * gate, up)).to(result.dtype)
        first = self.lora_A[next(name for name in active if name in self.lora_A)]
        hidden = F.conv2d(x, down, None, first.stride, first.padding, first.dilation)
        return (result + F.conv2d(hidden if gate is None else hidden * gate.view(-1, 1, 1), up)).to(result.dtype)

    return forward


def _stack(
    layer: Any, names: list[str], x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None:
    """The stacked factors, and the gate unless it is included in them; None if the adapters cannot be stacked."""
    if len(names) < 2 or type(x) is not torch.Tensor:
        return None
    pairs = [Factors(layer.lora_A[name], layer.lora_B[name]) for name in names]
    training = torch.is_grad_enabled()
    dtype = pairs[0].down.weight.dtype
    for name, pair in zip(names, pairs, strict=True):
        if type(layer.lora_dropout[name]) is not nn.Identity:
            return None
        for part in pair:
            weight = part.weight
            if type(part) not in _PLAIN or part.bias is not None or weight.dtype != dtype or weight.device != x.device:
                return None
            if part._forward_hooks or part._forward_pre_hooks or "forward" in part.__dict__:
                return None
            if training and weight.requires_grad:
                return None
    if isinstance(pairs[0].down, nn.Conv2d) and not all(_is_of_pair(layer, pair) for pair in pairs):
        return None
    scales: list[Any] = []
    for name in names:
        variant = layer.lora_variant.get(name)
        scale = layer.scaling[name] if variant is None else _gate_of_variant(variant, layer, name)
        if scale is None:
            return None
        scales.append(scale)
    downs, ups = [pair.down.weight for pair in pairs], [pair.up.weight for pair in pairs]
    if torch.compiler.is_compiling() or any(isinstance(scale, torch.Tensor) for scale in scales):
        downs = [_scaled(down, scale) for down, scale in zip(downs, scales, strict=True)]
        return torch.cat(downs), torch.cat(ups, 1), None
    return torch.cat(downs), torch.cat(ups, 1), _gate(layer, downs, scales)


def _gate_of_variant(variant: Any, layer: Any, name: str) -> torch.Tensor | None:
    """The gate of an adapter type that is a low-rank pair with a gate; None for PEFT's variants."""
    gate = getattr(variant, "gate_of_all", None)
    return None if gate is None else gate(layer, name)


def _is_of_pair(layer: Any, pair: Factors) -> bool:
    """Whether a convolution's factors have the layer's kernel (`down`) and a 1x1 kernel (`up`)."""
    down, base = pair.down, layer.base_layer
    same = (down.kernel_size, down.stride, down.padding, down.dilation) == (
        base.kernel_size,
        base.stride,
        base.padding,
        base.dilation,
    )
    plain = down.groups == 1 and down.padding_mode == "zeros" and pair.up.groups == 1
    return same and plain and pair.up.kernel_size == (1, 1) and pair.up.stride == (1, 1)


def _scaled(down: torch.Tensor, scale: Any) -> torch.Tensor:
    """`down` with each component multiplied by the scale."""
    if isinstance(scale, torch.Tensor) and scale.ndim:
        scale = scale.view(-1, *[1] * (down.ndim - 1))
    return down * (scale.to(down) if isinstance(scale, torch.Tensor) else scale)


def _gate(layer: Any, downs: list[torch.Tensor], scales: list[Any]) -> torch.Tensor:
    """The scale of each component, cached for the next call with the same scales."""
    ranks = tuple(len(down) for down in downs)
    key = (ranks, tuple(scales), downs[0].dtype, downs[0].device)
    kept = vars(layer).get("_lora_adapters_gate")
    if kept is None or kept[0] != key:
        values = [scale for rank, scale in zip(ranks, scales, strict=True) for _ in range(rank)]
        with torch.inference_mode(False):
            kept = key, torch.tensor(values, dtype=key[2], device=key[3])
        vars(layer)["_lora_adapters_gate"] = kept
    return kept[1]
