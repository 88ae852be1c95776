"""Dropout and norm limits on low-rank layers, as hooks: the layers themselves know nothing of them."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from lora_adapters.train.errors import TrainingError
from lora_adapters.types.layers import factors

_STACKED = 2**24  # weights that are computed on together: 64 MiB


def add_dropouts(
    layers: Iterable[Any], adapter: str, network: float | None, rank: float | None, module: float | None
) -> None:
    """Dropouts that act in training mode only.

    network: single activations between `down` and `up`. rank: whole components of one sample; what stays is divided
    by 1 - rank. module: the layer's whole change, without making up for it.
    """
    for name, value in (("network_dropout", network), ("rank_dropout", rank), ("module_dropout", module)):
        if value is not None and not 0 <= value < 1:
            raise TrainingError(f"{name} must be at least 0 and below 1, not {value}")
    for layer in layers:
        down, up = factors(layer, adapter)
        if network:
            down.register_forward_hook(lambda own, _, out, p=network: F.dropout(out, p, own.training))
        if rank:
            down.register_forward_hook(lambda own, _, out, p=rank: rank_dropout(out, p) if own.training else out)
        if module:
            up.register_forward_hook(lambda own, _, out, p=module: module_dropout(out, p) if own.training else out)


def rank_dropout(hidden: torch.Tensor, p: float) -> torch.Tensor:
    """`hidden` is (n, ..., rank) after a linear layer, (n, rank, h, w) after a convolution."""
    kept = torch.rand(hidden.shape[0], hidden.shape[1 if hidden.dim() == 4 else -1], device=hidden.device) > p
    shape = (*kept.shape, 1, 1) if hidden.dim() == 4 else (kept.shape[0], *[1] * (hidden.dim() - 2), kept.shape[1])
    return hidden * kept.view(shape).to(hidden) / (1 - p)


def module_dropout(out: torch.Tensor, p: float) -> torch.Tensor:
    """All of `out` or, with probability p, zero."""
    return out * (torch.rand((), device=out.device) >= p).to(out)


@torch.no_grad()
def norms(layers: Iterable[Any], adapter: str) -> torch.Tensor:
    """Frobenius norm of each layer's change of weight, without forming it: (layers,), on their device.

    ||UD||^2 is the sum over (UᵀU) * (DDᵀ), which are rank by rank. Layers of one shape are computed together.
    """
    alike: dict[Any, list[tuple[int, torch.Tensor, torch.Tensor]]] = defaultdict(list)
    for number, layer in enumerate(layers):
        down, up = (factor.weight.flatten(1) for factor in factors(layer, adapter))
        alike[down.shape, up.shape, float(layer.scaling[adapter])].append((number, down, up))
    found: list[tuple[int, torch.Tensor]] = []
    for (down_shape, up_shape, scale), members in alike.items():
        size = max(1, _STACKED // (down_shape.numel() + up_shape.numel()))
        for start in range(0, len(members), size):
            numbers, downs, ups = zip(*members[start : start + size], strict=True)
            own = _norms(torch.stack(downs).float(), torch.stack(ups).float()) * scale
            found += zip(numbers, own.unbind(), strict=True)
    return torch.stack([norm for _, norm in sorted(found, key=lambda item: item[0])])


@torch.no_grad()
def limit_norms(layers: Sequence[Any], adapter: str, largest: float) -> torch.Tensor:
    """Scale down every change whose norm is above `largest`, evenly in both factors; returns how many were, ()."""
    found = norms(layers, adapter)
    above = found > largest
    scales = torch.where(above, (largest / found).sqrt(), torch.ones_like(found))
    for layer, scale in zip(layers, scales.unbind(), strict=True):
        for factor in factors(layer, adapter):
            factor.weight.mul_(scale)
    return above.sum()


def _norms(down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """(layers,) from `down` (layers, rank, inputs) and `up` (layers, outputs, rank)."""
    return ((up.mT @ up) * (down @ down.mT)).sum((1, 2)).clamp(min=0).sqrt()
