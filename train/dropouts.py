"""Dropout and norm limits on low-rank layers, as hooks: the layers themselves know nothing of them."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F

from lora_adapters.train.errors import TrainingError


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
        down, up = layer.lora_A[adapter], layer.lora_B[adapter]
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
    """Frobenius norm of each layer's change of weight, without forming it: (layers,)."""
    return torch.stack([_norm(layer, adapter) for layer in layers])


@torch.no_grad()
def limit_norms(layers: Iterable[Any], adapter: str, largest: float) -> int:
    """Scale down every change whose norm is above `largest`, evenly in both factors; gives back how many were."""
    limited = 0
    for layer in layers:
        norm = _norm(layer, adapter).item()
        if norm > largest:
            factor = (largest / norm) ** 0.5
            layer.lora_A[adapter].weight.mul_(factor)
            layer.lora_B[adapter].weight.mul_(factor)
            limited += 1
    return limited


def _norm(layer: Any, adapter: str) -> torch.Tensor:
    """||UD||^2 is the sum over (UᵀU) * (DDᵀ), which are rank by rank."""
    down, up = (part[adapter].weight.float().flatten(1) for part in (layer.lora_A, layer.lora_B))
    return ((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt() * float(layer.scaling[adapter])
