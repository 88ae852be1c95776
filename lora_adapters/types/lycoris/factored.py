"""Computing f(x; ΔW) from the factors of ΔW, if that needs fewer operations than computing ΔW.

A Kronecker product is applied as two small products: (w1 ⊗ w2) x is w1 X w2ᵀ, where X is x as a matrix. The elementwise
product of two matrices of rank r is a low-rank pair of rank r², whose factors contain the products of their rows or
columns (the Khatri-Rao product; FedPara, arXiv:2108.06098, proposition 1). A full difference is applied directly.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lora_adapters.convert.deltas import Full, Hadamard, Kronecker
from lora_adapters.convert.deltas.base import Delta
from lora_adapters.convert.deltas.with_scalar import WithScalar

from .operations import applied, weight_shape

_DTYPES = (torch.float32, torch.float64, torch.bfloat16)  # products of factors may underflow in float16
_WORTH = 0.5  # use the factors if they need at most this share of the multiplications with ΔW


def applied_in_factors(layer: nn.Module, x: torch.Tensor, change: Delta) -> torch.Tensor | float | None:
    """The output of a layer for x if its weight and bias are replaced by those of a change.

    Args:
        layer: The layer; for normalisations, only full differences are supported.
        x: (..., in), or (batch, in, height, width).
        change: The change, with its multiplier.

    Returns:
        (..., out) or (batch, out, height, width), in x's dtype, or 0.0 if the change is zero; None if ΔW must be
        computed, or if that is as fast.
    """
    if isinstance(change, Full):
        return _full(layer, x, change)
    if x.dtype not in _DTYPES or not _is_plain(layer, x):
        return None
    if isinstance(change, WithScalar):
        inner = applied_in_factors(layer, x, change.change)
        return None if inner is None else inner * change.scalar.to(x.dtype)
    if isinstance(change, Kronecker):
        return _kronecker(layer, x, change)
    if isinstance(change, Hadamard) and change.t1 is None:
        return _hadamard(layer, x, change)
    return None


def _full(layer: Any, x: torch.Tensor, change: Full) -> torch.Tensor | float:
    """Apply the difference itself, without a copy if it has x's dtype; the output is multiplied by the multiplier."""
    weight = None if change.diff is None else change.diff.to(x.dtype).reshape(weight_shape(layer))
    bias = None if change.diff_b is None else change.diff_b.to(x.dtype)
    made = applied(layer, x, weight, bias)
    return made if change.multiplier == 1 else made * change.multiplier


def _is_plain(layer: Any, x: torch.Tensor) -> bool:
    """Whether this is a linear layer, or a convolution of a batch without groups and with zero padding."""
    if isinstance(layer, nn.Conv2d):
        return layer.groups == 1 and layer.padding_mode == "zeros" and x.ndim == 4
    return isinstance(layer, nn.Linear)


def _kronecker(layer: Any, x: torch.Tensor, change: Kronecker) -> torch.Tensor | None:
    wide = torch.promote_types(x.dtype, torch.float32)
    shape = weight_shape(layer)
    (rows, columns), _ = change.sizes
    out, into, kernel = shape[0] // rows, shape[1] // columns, math.prod(shape[2:])
    early, late = (
        rows * out * into * kernel + rows * columns * into,
        columns * out * into * kernel + rows * columns * out,
    )
    if min(early, late) > _WORTH * math.prod(shape):
        return None
    first, second = (factor.to(x.dtype) for factor in change.factors(wide))
    second = second.reshape(out, into, *shape[2:])
    if isinstance(layer, nn.Linear):
        matrix = x.reshape(*x.shape[:-1], columns, into)
        matrix = first @ (matrix @ second.T) if late <= early else (first @ matrix) @ second.T
        return matrix.reshape(*x.shape[:-1], rows * out)

    def convolved(maps: torch.Tensor) -> torch.Tensor:
        """w2 over each of (batch, n, in, height, width)."""
        made = F.conv2d(maps.flatten(0, 1), second, None, layer.stride, layer.padding, layer.dilation)
        return made.reshape(*maps.shape[:2], *made.shape[1:])

    def mixed(maps: torch.Tensor) -> torch.Tensor:
        """w1 over the n of (batch, n, channels, height, width)."""
        return (first @ maps.flatten(2)).reshape(len(maps), rows, *maps.shape[2:])

    maps = x.reshape(len(x), columns, into, *x.shape[2:])
    return (mixed(convolved(maps)) if late <= early else convolved(mixed(maps))).flatten(1, 2)


def _hadamard(layer: Any, x: torch.Tensor, change: Hadamard) -> torch.Tensor | None:
    wide = torch.promote_types(x.dtype, torch.float32)
    shape, rank = weight_shape(layer), change.rank**2
    if rank * (shape[0] + math.prod(shape[1:])) > _WORTH * math.prod(shape):
        return None
    a1, b1, a2, b2 = (factor.to(wide) for factor in (change.w1_a, change.w1_b, change.w2_a, change.w2_b))
    down = (b1[:, None] * b2[None]).reshape(rank, -1).to(x.dtype)
    scale = change.alpha * change.multiplier / change.rank
    up = ((a1 * scale)[:, :, None] * a2[:, None]).reshape(len(a1), rank).to(x.dtype)
    if isinstance(layer, nn.Linear):
        return F.linear(F.linear(x, down), up)
    hidden = F.conv2d(x, down.reshape(rank, *shape[1:]), None, layer.stride, layer.padding, layer.dilation)
    return F.conv2d(hidden, up[:, :, None, None])
