"""A change with a trained factor (LyCORIS' `use_scalar`)."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from typing_extensions import Self

from lora_adapters.convert.deltas.low_rank import finite

from .base import Delta, check_shape


@dataclass(frozen=True, eq=False, repr=False)
class WithScalar:
    """ΔW = scalar · (another delta's ΔW), where the scalar, (), is trained like the other tensors.

    Files have no place for it: as in LyCORIS' it is a part of the other delta's tensors.
    """

    change: Delta
    scalar: torch.Tensor

    def __post_init__(self) -> None:
        check_shape("scalar", self.scalar, ())

    def __repr__(self) -> str:
        return f"WithScalar({self.change!r})"

    @property
    def kind(self) -> str:
        """The kind of the other delta."""
        return self.change.kind

    @property
    def rank(self) -> int | None:
        """The rank of the other delta."""
        return self.change.rank

    @property
    def out_in(self) -> tuple[int, int] | None:
        """Those of the other delta."""
        return self.change.out_in

    @property
    def needs_base(self) -> bool:
        """Whether the other delta does."""
        return self.change.needs_base

    @property
    def changes_weight(self) -> bool:
        """Whether the other delta does."""
        return self.change.changes_weight

    def delta(self, base_weight: torch.Tensor | None = None, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """ΔW in full; see `Delta.delta`."""
        return self.change.delta(base_weight, dtype) * self.scalar.to(dtype)

    def bias(self, dtype: torch.dtype = torch.float32) -> torch.Tensor | None:
        """The change of the bias, with the scalar."""
        bias = self.change.bias(dtype)
        return None if bias is None else bias * self.scalar.to(dtype)

    def scaled(self, weight: float) -> Self:
        """The delta at another weight."""
        return replace(self, change=self.change.scaled(weight))

    def to(self, dtype: torch.dtype | None) -> Self:
        """The same delta with its tensors in another dtype; None keeps them."""
        return self if dtype is None else replace(self, change=self.change.to(dtype), scalar=self.scalar.to(dtype))

    def fits(self, weight_shape: tuple[int, ...]) -> bool:
        """Whether the other delta is for a weight of this shape."""
        return self.change.fits(weight_shape)

    def is_finite(self) -> bool:
        """Whether no number in its tensors is NaN or infinite."""
        return self.change.is_finite() and finite(self.scalar)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Those of the other delta, times the scalar."""
        return without_scalars(self).tensors()


def without_scalars(change: Any) -> Any:
    """The same change as files have it: a scalar, also one inside of a DoRA, is a part of the other tensors."""
    if isinstance(change, WithScalar):
        return change.change.scaled(float(change.scalar))
    inner = getattr(change, "change", None)
    return change if inner is None else replace(change, change=without_scalars(inner))
