"""A change multiplied by a trained scalar (LyCORIS' `use_scalar`)."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from typing_extensions import Self

from .base import check_shape
from .wrapper import Wrapper


@dataclass(frozen=True, eq=False, repr=False)
class WithScalar(Wrapper):
    """ΔW = scalar · (inner delta's ΔW), where the scalar, of shape (), is trained like the other tensors.

    Files do not store the scalar: as in LyCORIS, it is multiplied into the inner delta's tensors.
    """

    scalar: torch.Tensor

    def __post_init__(self) -> None:
        check_shape("scalar", self.scalar, ())

    def delta(self, base_weight: torch.Tensor | None = None, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """ΔW as a dense tensor; see `Delta.delta`."""
        return self.change.delta(base_weight, dtype) * self.scalar.to(dtype)

    def bias(self, dtype: torch.dtype = torch.float32) -> torch.Tensor | None:
        """The change of the bias, times the scalar."""
        bias = self.change.bias(dtype)
        return None if bias is None else bias * self.scalar.to(dtype)

    def scaled(self, weight: float) -> Self:
        """The delta multiplied by `weight`."""
        return replace(self, change=self.change.scaled(weight))

    def fits(self, weight_shape: tuple[int, ...]) -> bool:
        """Whether the inner delta fits a weight of this shape."""
        return self.change.fits(weight_shape)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of the inner delta, times the scalar."""
        return without_scalars(self).tensors()


def without_scalars(change: Any) -> Any:
    """The same change as files store it: scalars, also nested ones, are multiplied into the other tensors."""
    if isinstance(change, WithScalar):
        return change.change.scaled(float(change.scalar))
    inner = getattr(change, "change", None)
    return change if inner is None else replace(change, change=without_scalars(inner))
