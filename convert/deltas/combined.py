"""Pruning and merging several changes of one weight: TIES, DARE and magnitude pruning.

The arithmetic is that of PEFT's merge_utils. It is applied to the dense ΔW, as in the papers, and not to the factors
of low-rank pairs: pruned factors would give a result that depends on how each change is factorised.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from lora_adapters.convert.choices import MAJORITIES, METHODS
from lora_adapters.convert.errors import AdapterError

from .base import Delta
from .sum import Sum, of_one_shape


@dataclass(frozen=True)
class Combination:
    """How several changes are merged. Invalid values raise AdapterError.

    Attributes:
        method: "magnitude_prune" keeps the largest values of each change and adds up the weighted changes;
            "dare_linear" (arXiv:2311.03099) keeps random values, divided by the density; "ties" (arXiv:2306.01708)
            prunes by magnitude, elects a sign for each element, and takes the mean of the weighted changes with that
            sign; "dare_ties" does the same after random pruning.
        density: The share of values to keep, above 0 and up to 1.
        majority: The elected sign is that of the sum of the changes ("total") or of most changes ("frequency").
        seed: The seed of the random pruning.
    """

    method: str
    density: float
    majority: str = "total"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise AdapterError(f"unknown method {self.method}: choose one of {', '.join(METHODS)}")
        if not 0 < self.density <= 1:
            raise AdapterError(f"density must be above 0 and at most 1, got {self.density:g}")
        if self.majority not in MAJORITIES:
            raise AdapterError(f"unknown majority {self.majority}: choose one of {', '.join(MAJORITIES)}")

    def of(self, name: str) -> "Combination":
        """The same combination with a seed that is derived from the module's name alone."""
        digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
        return replace(self, seed=int.from_bytes(digest[:7], "little"))

    def __call__(self, changes: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
        """Merge changes of one shape; the tensors may be overwritten."""
        if self.method.startswith("dare"):
            generator = torch.Generator().manual_seed(self.seed)
            kept = [prune_at_random(change, self.density, generator) for change in changes]
        else:
            kept = [prune_small(change, self.density) for change in changes]
        agreed = self._agreed(kept) if self.method.endswith("ties") else None
        total = torch.zeros_like(kept[0])
        for number, (change, weight) in enumerate(zip(kept, weights, strict=True)):
            total.add_(change if agreed is None else change.mul_(agreed[number]), alpha=weight)
        return total if agreed is None else total.div_(torch.stack(agreed).sum(0).clamp_min(1))

    def _agreed(self, kept: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """For each change, a mask of the elements with the elected sign; False for elements of 0."""
        votes = torch.zeros_like(kept[0])
        for change in kept:
            votes.add_(change if self.majority == "total" else change.sign())
        elected = torch.where(votes >= 0, 1.0, -1.0)
        return [change.sign() == elected for change in kept]


def prune_small(change: torch.Tensor, density: float) -> torch.Tensor:
    """Set the smallest values of a change to 0, in place.

    Args:
        change: Any shape.
        density: Share of the values to keep, 0 to 1; their count is rounded down. Values as large as the smallest
            kept value are also kept.

    Returns:
        `change`.
    """
    count = int(density * change.numel())
    if count >= change.numel():
        return change
    if count == 0:
        return change.zero_()
    size = change.abs()
    smallest = size.flatten().kthvalue(change.numel() - count + 1).values
    return change.mul_(size >= smallest)


def prune_at_random(change: torch.Tensor, density: float, generator: torch.Generator) -> torch.Tensor:
    """Set random values of a change to 0, in place, and divide the others by `density`, the share that is kept."""
    kept = torch.bernoulli(torch.full((change.numel(),), density), generator=generator).reshape(change.shape)
    return change.mul_(kept.to(change)).div_(density)


@dataclass(frozen=True, eq=False, repr=False)
class Combined(Sum):
    """Several changes of one weight, and of its bias, merged by a `Combination`."""

    weights: tuple[float, ...]
    combination: Combination

    def __repr__(self) -> str:
        return f"{self.combination.method}({', '.join(map(repr, self.parts))})"

    def delta(self, base_weight: torch.Tensor | None = None, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """ΔW as a dense tensor; see `Delta.delta`."""
        changing = [
            (part, weight) for part, weight in zip(self.parts, self.weights, strict=True) if part.changes_weight
        ]
        changes = of_one_shape([part.delta(base_weight, dtype) for part, _ in changing or [(self.parts[0], 1.0)]])
        return self.combination(changes, [weight for _, weight in changing] or [1.0])

    def bias(self, dtype: torch.dtype = torch.float32) -> torch.Tensor | None:
        """The change of the bias; None if no part changes it."""
        both = [(part.bias(dtype), weight) for part, weight in zip(self.parts, self.weights, strict=True)]
        changing = [(bias, weight) for bias, weight in both if bias is not None]
        if not changing:
            return None
        return self.combination([bias for bias, _ in changing], [weight for _, weight in changing])

    def scaled(self, weight: float) -> "Combined":
        """The merged change multiplied by `weight`."""
        return replace(self, weights=tuple(weight * factor for factor in self.weights))

    def to(self, dtype: torch.dtype | None) -> "Combined":
        """The same changes with their tensors in `dtype`; None keeps their dtypes."""
        return replace(self, parts=tuple(part.to(dtype) for part in self.parts))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Raise AdapterError: a pruned change is not a product of factors."""
        raise AdapterError(f"a change merged by {self.combination.method} cannot be written: reduce it to a rank")


def combined(name: str, parts: Sequence[tuple[Delta, float]], combination: Combination) -> Delta:
    """Merge (change, weight) pairs of one module by a combination; the seed is derived from `name`, the module's."""
    return Combined(tuple(part for part, _ in parts), tuple(weight for _, weight in parts), combination.of(name))
