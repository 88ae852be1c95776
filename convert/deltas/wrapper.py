"""`Wrapper`, the base class of deltas that contain another delta."""

from dataclasses import dataclass, replace

import torch
from typing_extensions import Self

from lora_adapters.convert.deltas.low_rank import finite

from .base import Delta, tensor_fields


@dataclass(frozen=True, eq=False, repr=False)
class Wrapper:
    """A delta with tensors of its own that contains another delta and delegates to it by default."""

    change: Delta

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.change!r})"

    @property
    def kind(self) -> str:
        """The kind of the inner delta."""
        return self.change.kind

    @property
    def rank(self) -> int | None:
        """The rank of the inner delta."""
        return self.change.rank

    @property
    def out_in(self) -> tuple[int, int] | None:
        """Output and input channels of the inner delta; None if they are not known."""
        return self.change.out_in

    @property
    def needs_base(self) -> bool:
        """Whether the inner delta needs the weight."""
        return self.change.needs_base

    @property
    def changes_weight(self) -> bool:
        """Whether the inner delta changes the weight."""
        return self.change.changes_weight

    def to(self, dtype: torch.dtype | None) -> Self:
        """The same delta with its tensors in `dtype`; None keeps their dtypes."""
        if dtype is None:
            return self
        own = {name: tensor.to(dtype) for name, tensor in tensor_fields(self).items()}
        return replace(self, change=self.change.to(dtype), **own)  # type: ignore[arg-type]

    def is_finite(self) -> bool:
        """Whether all values in the tensors are finite."""
        return self.change.is_finite() and all(map(finite, tensor_fields(self).values()))
