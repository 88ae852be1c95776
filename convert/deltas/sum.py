"""The sum of several changes of one weight, of any kinds."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch

from lora_adapters.convert.errors import AdapterError

from .base import Delta, with_article
from .low_rank import LowRank, add_up
from .tucker import Tucker


@dataclass(frozen=True, eq=False, repr=False)
class Sum:
    """ΔW = ΔW₁ + ΔW₂ + ..., all computed from the same W; biases are summed likewise.

    The sum is computed when `delta` is called.
    """

    parts: tuple[Delta, ...]

    def __repr__(self) -> str:
        return f"Sum({', '.join(map(repr, self.parts))})"

    @property
    def kind(self) -> str:
        """The kinds of the parts, joined by " + "."""
        return " + ".join(dict.fromkeys(part.kind for part in self.parts))

    @property
    def rank(self) -> None:
        """None: a sum is not a product of factors."""

    @property
    def out_in(self) -> tuple[int, int] | None:
        """Output and input channels; None if no part knows them."""
        return next((part.out_in for part in self.parts if part.out_in is not None), None)

    @property
    def needs_base(self) -> bool:
        """Whether any part depends on W."""
        return any(part.needs_base for part in self.parts)

    @property
    def changes_weight(self) -> bool:
        """Whether any part changes the weight."""
        return any(part.changes_weight for part in self.parts)

    def delta(self, base_weight: torch.Tensor | None = None, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """ΔW as a dense tensor; see `Delta.delta`."""
        changes = (part.delta(base_weight, dtype) for part in self.parts)
        total = next(changes)
        for change in changes:
            total, change = of_one_shape([total, change])
            total.add_(change)
        return total

    def bias(self, dtype: torch.dtype = torch.float32) -> torch.Tensor | None:
        """The sum of the changes of the bias; None if no part changes it."""
        biases = [bias for part in self.parts if (bias := part.bias(dtype)) is not None]
        return torch.stack(biases).sum(0) if biases else None

    def scaled(self, weight: float) -> "Sum":
        """The sum multiplied by `weight`."""
        return Sum(tuple(part.scaled(weight) for part in self.parts))

    def to(self, dtype: torch.dtype | None) -> "Sum":
        """The same changes with their tensors in `dtype`; None keeps their dtypes."""
        return Sum(tuple(part.to(dtype) for part in self.parts))

    def fits(self, weight_shape: tuple[int, ...]) -> bool:
        """Whether all parts fit a weight of this shape."""
        return all(part.fits(weight_shape) for part in self.parts)

    def is_finite(self) -> bool:
        """Whether all values in the tensors are finite."""
        return all(part.is_finite() for part in self.parts)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Raise AdapterError: files cannot store a sum of several kinds."""
        raise AdapterError(f"a sum of {self.kind} cannot be written: reduce it to a rank (--new_rank)")


def of_one_shape(changes: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Reshape changes of one weight to the shape with the most dimensions: some may have flattened kernels."""
    first = max(changes, key=lambda change: change.ndim)
    for change in changes:
        if len(change) != len(first) or change.numel() != first.numel():
            raise AdapterError(f"weight shapes differ: {list(first.shape)} and {list(change.shape)}")
    return [change.reshape(first.shape) for change in changes]


def as_pair(change: Delta) -> LowRank | None:
    """The change as an exactly equal low-rank pair; None for kinds that are not low-rank pairs."""
    if isinstance(change, Tucker) and change.mid.ndim == 4:
        return change.low_rank()
    return change if isinstance(change, LowRank) else None


def pair_of(change: Delta) -> LowRank:
    """The change as an exactly equal low-rank pair; AdapterError, which names the kind, for other kinds."""
    pair = as_pair(change)
    if pair is None:
        what = with_article(change.kind)
        what = f"{what} with a bias" if change.kind == "LoRA" and change.bias() is not None else what
        raise AdapterError(
            f"{what} is not a low-rank pair (LoRA, LoCon, DyLoRA), which is needed here: "
            "convert it with `lora-adapters convert --to lora --rank N`"
        )
    return pair


def added(parts: Sequence[Delta], scale: float | None = None) -> Delta:
    """The sum of changes of one weight: an exact pair if all are low-rank pairs (see `add_up`), otherwise a `Sum`."""
    if len(parts) == 1:
        return parts[0]
    pairs = [pair for part in parts if (pair := as_pair(part)) is not None]
    if len(pairs) == len(parts):
        return add_up(pairs, scale)
    sizes = {size for part in parts if (size := _size(part)) is not None}
    if len(sizes) > 1:
        raise AdapterError(f"weight sizes differ: {' and '.join(map(str, sorted(sizes)))} elements")
    return Sum(tuple(parts))


def _size(change: Delta) -> int | None:
    """The number of elements of the weight, if the change is a low-rank pair."""
    pair = as_pair(change)
    return None if pair is None else prod((*pair.out_in, *pair.kernel))
