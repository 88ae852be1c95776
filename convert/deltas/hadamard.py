"""LoHa: the elementwise product of two low-rank matrices (FedPara, arXiv:2108.06098)."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from typing_extensions import Self

from lora_adapters.convert.deltas.low_rank import with_alpha
from lora_adapters.convert.errors import AdapterError

from .base import TensorDelta, Tensors, alpha_of, check_shape, check_suffixes, present, without_ones
from .tucker import contract

_FACTORS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


@dataclass(frozen=True, eq=False, repr=False)
class Hadamard(TensorDelta):
    """ΔW = (alpha / rank) · (w1_a · w1_b) ⊙ (w2_a · w2_b).

    The `a` are (out, rank), the `b` are (rank, in * height * width). With the Tucker cores t1 and t2, both
    (rank, rank, height, width), the `a` are (rank, out), the `b` are (rank, in), and `contract` computes each of the
    two kernels.
    """

    kind: ClassVar[str] = "LoHa"
    suffixes: ClassVar[tuple[str, ...]] = (*_FACTORS, "hada_t1", "hada_t2")

    w1_a: torch.Tensor
    w1_b: torch.Tensor
    w2_a: torch.Tensor
    w2_b: torch.Tensor
    alpha: float
    t1: torch.Tensor | None = None
    t2: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if (self.t1 is None) != (self.t2 is None):
            raise AdapterError("only one of hada_t1 and hada_t2 is present: a LoHa needs both or neither")
        check_shape("hada_w1_b", self.w1_b, (None, None))
        rank, columns = self.w1_b.shape
        check_shape("hada_w1_a", self.w1_a, (None, rank) if self.t1 is None else (rank, None))
        check_shape("hada_w2_a", self.w2_a, tuple(self.w1_a.shape))
        check_shape("hada_w2_b", self.w2_b, (rank, columns))
        if self.t1 is not None and self.t2 is not None:
            if self.t1.ndim < 3 or tuple(self.t1.shape[:2]) != (rank, rank) or 0 in self.t1.shape:
                raise AdapterError(f"hada_t1 has the shape {list(self.t1.shape)}, but the rank is {rank}")
            check_shape("hada_t2", self.t2, tuple(self.t1.shape))
        if not math.isfinite(self.alpha):
            raise AdapterError(f"alpha is {self.alpha}")
        self._check_floating()

    @property
    def rank(self) -> int:
        """The rank of each of the two matrices; ΔW has a rank of up to its square."""
        return self.w1_b.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in * height * width), or (out, in, height, width) with Tucker cores."""
        if self.t1 is None:
            return self.w1_a.shape[0], self.w1_b.shape[1]
        return (self.w1_a.shape[1], self.w1_b.shape[1], *self.t1.shape[2:])

    def fits(self, weight_shape: tuple[int, ...]) -> bool:
        """Whether the LoHa fits a weight of this shape; without Tucker cores its kernel is flattened."""
        if self.t1 is None:
            return (weight_shape[0], math.prod(weight_shape[1:])) == self.shape
        return without_ones(self.shape) == without_ones(weight_shape)

    def _dense(self, base_weight: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        scale = self.alpha * self.multiplier / self.rank
        first = _product(self.w1_a.to(dtype) * scale, self.w1_b, self.t1, dtype)  # cheaper than scaling ΔW
        return first.mul_(_product(self.w2_a, self.w2_b, self.t2, dtype))

    def tensors(self) -> dict[str, torch.Tensor]:
        """`hada_w1_a` to `hada_w2_b`, `hada_t1` and `hada_t2` (if present) and `alpha`."""
        tensors = dict(zip(_FACTORS, (self.w1_a, self.w1_b, self.w2_a, self.w2_b), strict=True))
        tensors |= present(hada_t1=self.t1, hada_t2=self.t2)
        return with_alpha(tensors, self.alpha * self.multiplier, self.rank, "hada_w1_a")

    @classmethod
    def read(cls, tensors: Tensors) -> Self | None:
        """Read the LoHa from a module's tensors; None if they are of another kind."""
        if not any(name in tensors for name in cls.suffixes):
            return None
        check_suffixes("LoHa", tensors, _FACTORS, ("hada_t1", "hada_t2", "alpha"))
        w1_a, w1_b, w2_a, w2_b = (tensors[name] for name in _FACTORS)
        check_shape("hada_w1_b", w1_b, (None, None))
        alpha = alpha_of(tensors, w1_b.shape[0])
        return cls(w1_a, w1_b, w2_a, w2_b, alpha, tensors.get("hada_t1"), tensors.get("hada_t2"))


def _product(a: torch.Tensor, b: torch.Tensor, core: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """One of the two matrices of a LoHa."""
    a, b = a.to(dtype), b.to(dtype)
    return a @ b if core is None else contract(core.to(dtype), a, b)
