"""GLoRA: an additive low-rank change plus one that is multiplied by the weight itself (arXiv:2306.07967)."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from typing_extensions import Self

from lora_adapters.convert.deltas.low_rank import with_alpha
from lora_adapters.convert.errors import AdapterError

from .base import (
    TensorDelta,
    Tensors,
    alpha_of,
    check_matrix_like,
    check_suffixes,
    present,
)
from .tucker import contract

_FACTORS = ("a1.weight", "a2.weight", "b1.weight", "b2.weight")


@dataclass(frozen=True, eq=False, repr=False)
class GLoRA(TensorDelta):
    """ΔW = (alpha / rank) · (W · a1 · a2 + b1 · b2).

    `a1` is (in, rank), `a2` is (rank, in), `b1` is (out, rank) and `b2` is (rank, in) or (rank, in, height, width); for
    a convolution they have two more dimensions of size 1. W · a1 · a2 is a product over the input channels, at each
    kernel position. With `bm`, (rank, rank, height, width), b1 · b2 is Tucker-decomposed.
    """

    kind: ClassVar[str] = "GLoRA"
    suffixes: ClassVar[tuple[str, ...]] = (*_FACTORS, "bm.weight")

    a1: torch.Tensor
    a2: torch.Tensor
    b1: torch.Tensor
    b2: torch.Tensor
    alpha: float
    bm: torch.Tensor | None = None

    def __post_init__(self) -> None:
        check_matrix_like("a2.weight", self.a2)
        rank, into = self.a2.shape[:2]
        check_matrix_like("a1.weight", self.a1, into, rank)
        check_matrix_like("b1.weight", self.b1, columns=rank)
        if self.b2.ndim < 2 or tuple(self.b2.shape[:2]) != (rank, into) or 0 in self.b2.shape:
            raise AdapterError(f"b2.weight has the shape {list(self.b2.shape)}, expected [{rank}, {into}, ...]")
        if self.bm is not None and (self.bm.ndim < 3 or tuple(self.bm.shape[:2]) != (rank, rank)):
            raise AdapterError(f"bm.weight has the shape {list(self.bm.shape)}, but the rank is {rank}")
        if not math.isfinite(self.alpha):
            raise AdapterError(f"alpha is {self.alpha}")
        self._check_floating()

    @property
    def rank(self) -> int:
        """The rank of each of the two products."""
        return self.a2.shape[0]

    @property
    def needs_base(self) -> bool:
        """True: W is a factor of ΔW."""
        return True

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in) or (out, in, height, width)."""
        kernel = (self.b2 if self.bm is None else self.bm).shape[2:]
        return (self.b1.shape[0], self.a1.shape[0], *kernel)

    def _dense(self, base_weight: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        assert base_weight is not None
        a1, a2, b1, b2 = (factor.to(dtype) for factor in (self.a1, self.a2, self.b1, self.b2))
        if self.bm is None:
            added = (b1.flatten(1) @ b2.flatten(1)).reshape(base_weight.shape)
        else:
            added = contract(self.bm.to(dtype), b1.flatten(1).T, b2.flatten(1)).reshape(base_weight.shape)
        narrow = torch.einsum("oi...,ir->or...", base_weight.to(dtype), a1.flatten(1))
        added.add_(torch.einsum("or...,ri->oi...", narrow, a2.flatten(1)))
        return added.mul_(self.alpha * self.multiplier / self.rank)

    def tensors(self) -> dict[str, torch.Tensor]:
        """`a1.weight`, `a2.weight`, `b1.weight`, `b2.weight`, `bm.weight` (if present) and `alpha`."""
        tensors = dict(zip(_FACTORS, (self.a1, self.a2, self.b1, self.b2), strict=True))
        tensors |= present(**{"bm.weight": self.bm})
        alpha = self.alpha * self.multiplier
        if alpha == 0:  # readers take alpha 0 for the rank: disable both products by zeros in a factor of each
            tensors["a2.weight"] = torch.zeros_like(self.a2)
        return with_alpha(tensors, alpha, self.rank, "b2.weight")

    @classmethod
    def read(cls, tensors: Tensors) -> Self | None:
        """Read the GLoRA from a module's tensors; None if they are of another kind."""
        if not any(name in tensors for name in cls.suffixes):
            return None
        check_suffixes("GLoRA", tensors, _FACTORS, ("bm.weight", "alpha"))
        a1, a2, b1, b2 = (tensors[name] for name in _FACTORS)
        check_matrix_like("a2.weight", a2)
        return cls(a1, a2, b1, b2, alpha_of(tensors, a2.shape[0]), tensors.get("bm.weight"))
