"""What the deltas that wrap another one have in common."""

from dataclasses import dataclass, replace

import torch
from typing_extensions import Self

from lora_adapters.convert.deltas.low_rank import finite

from .base import Delta, tensor_fields


@dataclass(frozen=True, eq=False, repr=False)
class Wrapper:
    """A delta made from another one, with tensors of its own; what it does not change is the other delta's."""

    change: Delta

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.change!r})"

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
        """Output and input channels of the other delta; None if it does not tell them."""
        return self.change.out_in

    @property
    def needs_base(self) -> bool:
        """Whether the other delta needs the weight."""
        return self.change.needs_base

    @property
    def changes_weight(self) -> bool:
        """Whether the other delta changes the weight."""
        return self.change.changes_weight

    def to(self, dtype: torch.dtype | None) -> Self:
        """The same delta with its tensors in another dtype; None keeps them."""
        if dtype is None:
            return self
        own = {name: tensor.to(dtype) for name, tensor in tensor_fields(self).items()}
        return replace(self, change=self.change.to(dtype), **own)  # type: ignore[arg-type]

    def is_finite(self) -> bool:
        """Whether no number in its tensors is NaN or infinite."""
        return self.change.is_finite() and all(map(finite, tensor_fields(self).values()))
