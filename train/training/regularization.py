"""Dropout and norm limits for adapter layers. Dropout is added with hooks, so that the layers stay unchanged."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from lora_adapters.convert.deltas import IA3, Full, GLoRA, Hadamard, Kronecker, Norm, Tucker
from lora_adapters.convert.deltas.base import with_article
from lora_adapters.convert.deltas.low_rank import LowRank
from lora_adapters.convert.deltas.with_scalar import WithScalar
from lora_adapters.train.errors import TrainingError
from lora_adapters.types.layers import factors
from lora_adapters.types.lycoris.layer import held
from lora_adapters.types.lycoris.operations import base_weight, weight_shape
from lora_adapters.types.lycoris.weights import DeltaWeights

_STACKED = 2**24  # weights in one batched computation: 64 MiB


def add_dropouts(
    layers: Iterable[Any], adapter: str, network: float | None, rank: float | None, module: float | None
) -> None:
    """Add dropouts, which act in training mode only.

    Args:
        layers: Layers with the adapter.
        adapter: The name of the adapter.
        network: Probability to drop single activations between `down` and `up`; None or 0 is off.
        rank: Probability to drop whole components of a sample, or whole output channels for a delta that is not a
            low-rank pair; the others are divided by 1 - rank.
        module: Probability to drop the whole delta of a layer; the others are not scaled.

    Raises:
        TrainingError: A probability is not in [0, 1), or `network` is used with a delta that is not a low-rank pair.
    """
    for name, value in (("network_dropout", network), ("rank_dropout", rank), ("module_dropout", module)):
        if value is not None and not 0 <= value < 1:
            raise TrainingError(f"{name} must be at least 0 and below 1, not {value}")
    for layer in layers:
        if (weights := held(layer, adapter)) is not None:
            if network and weights.change.kind != "norm":
                kind = with_article(weights.change.kind)
                raise TrainingError(
                    f"network_dropout: {kind} has no activations between its factors; use rank_dropout or "
                    "module_dropout, which work with every kind"
                )
            if rank:
                weights.register_forward_hook(lambda own, _, out, p=rank: drop_rows(out, p) if own.training else out)
            if module:
                weights.register_forward_hook(lambda own, _, out, p=module: drop_all(out, p) if own.training else out)
            continue
        down, up = factors(layer, adapter)
        if network:
            down.register_forward_hook(lambda own, _, out, p=network: F.dropout(out, p, own.training))
        if rank:
            down.register_forward_hook(lambda own, _, out, p=rank: rank_dropout(out, p) if own.training else out)
        if module:
            up.register_forward_hook(lambda own, _, out, p=module: module_dropout(out, p) if own.training else out)


def rank_dropout(hidden: torch.Tensor, p: float) -> torch.Tensor:
    """Drop components of each sample. `hidden`: (n, ..., rank) of a linear layer, (n, rank, h, w) of a convolution."""
    kept = torch.rand(hidden.shape[0], hidden.shape[1 if hidden.dim() == 4 else -1], device=hidden.device) > p
    shape = (*kept.shape, 1, 1) if hidden.dim() == 4 else (kept.shape[0], *[1] * (hidden.dim() - 2), kept.shape[1])
    return hidden * kept.view(shape).to(hidden) / (1 - p)


def module_dropout(out: torch.Tensor, p: float) -> torch.Tensor:
    """Return `out`, or zeros with probability p."""
    return out * (torch.rand((), device=out.device) >= p).to(out)


Change = tuple[torch.Tensor | None, torch.Tensor | None]  # of a weight and of a bias


def drop_rows(change: Change, p: float) -> Change:
    """Zero each output channel of a delta with probability p; the others are divided by 1 - p."""
    sizes = next(part for part in change if part is not None)
    kept = (torch.rand(len(sizes), device=sizes.device) > p).to(sizes) / (1 - p)
    weight, bias = (None if part is None else part * kept.view(-1, *[1] * (part.ndim - 1)) for part in change)
    return weight, bias


def drop_all(change: Change, p: float) -> Change:
    """Return a delta, or zeros with probability p."""
    kept = torch.rand(()) >= p
    weight, bias = (None if part is None else part * kept.to(part) for part in change)
    return weight, bias


# If all tensors of a delta are multiplied by f, the delta is multiplied by f**power. None: the power is the number of
# tensors.
_POWERS: dict[type, int | None] = {
    LowRank: None, Tucker: None, Hadamard: None, Kronecker: None, GLoRA: 2, Full: 1, Norm: 1, IA3: 1,
}  # fmt: skip


def check_limits(layers: Iterable[Any], adapter: str) -> None:
    """Raise TrainingError for a kind of delta whose norm cannot be limited by scaling its tensors."""
    for layer in layers:
        weights = held(layer, adapter)
        if weights is not None and not isinstance(weights.change, (WithScalar, *_POWERS)):
            raise TrainingError(f"--scale_weight_norms: {with_article(weights.change.kind)} has no factor to scale")


def _dense_norm(layer: Any, weights: DeltaWeights, scale: float) -> torch.Tensor:
    base = layer.get_base_layer()
    own = base_weight(base, weights.weight.device)
    change, _ = weights(weight_shape(base), scale, own, torch.float32)
    return torch.zeros((), device=own.device) if change is None else torch.linalg.vector_norm(change)


def _shrink(weights: DeltaWeights, factor: torch.Tensor) -> None:
    """Multiply a delta by a factor, spread evenly over all its tensors."""
    change = weights.change
    if isinstance(change, WithScalar):
        change.scalar.mul_(factor)
        return
    tensors = list(weights.parameters())
    power = _POWERS[type(change)] or len(tensors)
    for tensor in tensors:
        tensor.mul_(factor ** (1 / power))


@torch.no_grad()
def norms(layers: Iterable[Any], adapter: str) -> torch.Tensor:
    """The Frobenius norm of each layer's weight delta.

    For low-rank pairs ΔW is not computed: ‖UD‖² is the sum over (UᵀU) * (DDᵀ), which are (rank, rank). Layers of the
    same shape are computed in one batch.

    Args:
        layers: Layers with the adapter.
        adapter: The name of the adapter.

    Returns:
        A tensor (layers,) on their device.
    """
    alike: dict[Any, list[tuple[int, torch.Tensor, torch.Tensor]]] = defaultdict(list)
    numbered: list[tuple[int, torch.Tensor]] = []
    for number, layer in enumerate(layers):
        if (weights := held(layer, adapter)) is not None:
            numbered.append((number, _dense_norm(layer, weights, float(layer.scaling[adapter]))))
            continue
        down, up = (factor.weight.flatten(1) for factor in factors(layer, adapter))
        alike[down.shape, up.shape, float(layer.scaling[adapter])].append((number, down, up))
    for (down_shape, up_shape, scale), members in alike.items():
        size = max(1, _STACKED // (down_shape.numel() + up_shape.numel()))
        for start in range(0, len(members), size):
            numbers, downs, ups = zip(*members[start : start + size], strict=True)
            own = _norms(torch.stack(downs).float(), torch.stack(ups).float()) * scale
            numbered += zip(numbers, own.unbind(), strict=True)
    return torch.stack([norm for _, norm in sorted(numbered, key=lambda item: item[0])])


@torch.no_grad()
def limit_norms(layers: Sequence[Any], adapter: str, largest: float) -> torch.Tensor:
    """Scale down every delta whose norm is above `largest`, evenly in all its factors. Returns their number, ()."""
    sizes = norms(layers, adapter)
    above = sizes > largest
    scales = torch.where(above, largest / sizes, torch.ones_like(sizes))
    for layer, scale, root in zip(layers, scales.unbind(), scales.sqrt().unbind(), strict=True):
        if (weights := held(layer, adapter)) is not None:
            _shrink(weights, scale)
            continue
        for factor in factors(layer, adapter):
            factor.weight.mul_(root)
    return above.sum()


def _norms(down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Norms (layers,) of `up` @ `down`, from `down` (layers, rank, inputs) and `up` (layers, outputs, rank)."""
    return ((up.mT @ up) * (down @ down.mT)).sum((1, 2)).clamp(min=0).sqrt()
