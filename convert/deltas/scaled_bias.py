"""Changes that scale a layer's bias (PEFT's IA3 of output channels), converted to additive changes of a given bias."""

from dataclasses import replace

import torch

from .base import Delta
from .full import WithBias
from .ia3 import IA3
from .sum import Sum


def scales_bias(change: Delta) -> bool:
    """Whether the change scales the bias of its layer, if the layer has one."""
    if isinstance(change, Sum):
        return any(map(scales_bias, change.parts))
    if isinstance(change, WithBias):
        return scales_bias(change.change)
    return isinstance(change, IA3) and change.scales_bias


def with_base_bias(change: Delta, bias: torch.Tensor) -> Delta:
    """Replace the scaling of the bias by the equivalent additive change, for a given bias.

    Args:
        change: A change that fits the layer's weight.
        bias: The layer's bias, (out,).

    Returns:
        A change that does not scale the bias; `change` itself if it does not scale it.
    """
    if not scales_bias(change):
        return change
    if isinstance(change, Sum):
        return replace(change, parts=tuple(with_base_bias(part, bias) for part in change.parts))
    if isinstance(change, WithBias):
        scaled = with_base_bias(change.change, bias)
        assert isinstance(scaled, WithBias)
        return WithBias(scaled.change, change.bias() + scaled.bias())
    assert isinstance(change, IA3)
    vector = change.vector.flatten()
    added = vector.float() * bias.to(vector.device, torch.float32)
    return WithBias(replace(change, scales_bias=False), added, change.multiplier)
