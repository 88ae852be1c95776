"""LoKr: a Kronecker product, whose factors may be low-rank themselves (LyCORIS, arXiv:2309.14859, section 3.3)."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from typing_extensions import Self

from lora_adapters.convert.deltas.low_rank import with_alpha
from lora_adapters.convert.errors import AdapterError

from .base import TensorDelta, Tensors, alpha_of, check_shape, check_suffixes, present, times
from .tucker import contract


@dataclass(frozen=True, eq=False, repr=False)
class Kronecker(TensorDelta):
    """ΔW = (alpha / rank) · w1 ⊗ w2, where w1 and w2 are each full or a product of two factors.

    `w1` is (a, b), or w1_a · w1_b with the shapes (a, rank) and (rank, b). `w2` is (c, d) or (c, d, height, width), or
    w2_a · w2_b with the shapes (c, rank) and (rank, d), (rank, d * height * width) or (rank, d, height, width). With
    the Tucker core t2, (rank, rank, height, width), w2_a is (rank, c) and w2_b is (rank, d). ΔW is (a * c, b * d, ...).

    If both are full, there is no rank, and the scale is 1 whatever alpha is.
    """

    kind: ClassVar[str] = "LoKr"
    suffixes: ClassVar[tuple[str, ...]] = (
        "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"
    )  # fmt: skip

    w1: torch.Tensor | None
    w2: torch.Tensor | None
    alpha: float
    w1_a: torch.Tensor | None = None
    w1_b: torch.Tensor | None = None
    w2_a: torch.Tensor | None = None
    w2_b: torch.Tensor | None = None
    t2: torch.Tensor | None = None

    def __post_init__(self) -> None:
        for name, full, a, b in (("w1", self.w1, self.w1_a, self.w1_b), ("w2", self.w2, self.w2_a, self.w2_b)):
            if (a is None) != (b is None) or (full is None) == (a is None):
                raise AdapterError(f"a LoKr module needs either lokr_{name} or both lokr_{name}_a and lokr_{name}_b")
        if self.w1 is not None:
            check_shape("lokr_w1", self.w1, (None, None))
        if self.w2 is not None and (self.w2.ndim < 2 or 0 in self.w2.shape):
            raise AdapterError(f"lokr_w2 has the shape {list(self.w2.shape)}, expected a matrix or a kernel")
        if self.t2 is not None and self.w2 is not None:
            raise AdapterError("lokr_t2 belongs to lokr_w2_a and lokr_w2_b, not to lokr_w2")
        self._check_factors()
        if not math.isfinite(self.alpha):
            raise AdapterError(f"alpha is {self.alpha}")
        self._check_floating()

    def _check_factors(self) -> None:
        if self.w1_a is not None and self.w1_b is not None:
            check_shape("lokr_w1_b", self.w1_b, (None, None))
            check_shape("lokr_w1_a", self.w1_a, (None, self.w1_b.shape[0]))
        if self.w2_a is None or self.w2_b is None:
            return
        if self.w2_b.ndim < 2 or 0 in self.w2_b.shape:
            raise AdapterError(f"lokr_w2_b has the shape {list(self.w2_b.shape)}, expected a matrix or a kernel")
        rank = self.w2_b.shape[0]
        if self.w1_b is not None and self.w1_b.shape[0] != rank:
            raise AdapterError(f"ranks differ: lokr_w1_b has {self.w1_b.shape[0]}, lokr_w2_b has {rank}")
        check_shape("lokr_w2_a", self.w2_a, (None, rank) if self.t2 is None else (rank, None))
        if self.t2 is not None:
            check_shape("lokr_w2_b", self.w2_b, (rank, None))
            if self.t2.ndim < 3 or tuple(self.t2.shape[:2]) != (rank, rank) or 0 in self.t2.shape:
                raise AdapterError(f"lokr_t2 has the shape {list(self.t2.shape)}, but the rank is {rank}")

    @property
    def rank(self) -> int | None:
        """The rank of the factors; None if both w1 and w2 are full."""
        factor = self.w2_b if self.w1_b is None else self.w1_b
        return None if factor is None else factor.shape[0]

    @property
    def scale(self) -> float:
        """The multiplier times alpha / rank, or the multiplier alone if there is no rank."""
        return self.multiplier if self.rank is None else self.alpha * self.multiplier / self.rank

    @property
    def sizes(self) -> tuple[tuple[int, int], tuple[int, ...]]:
        """The shapes of w1 and w2 that follow from the file's tensors."""
        if self.w1_a is not None and self.w1_b is not None:
            first = (self.w1_a.shape[0], self.w1_b.shape[1])
        else:
            assert self.w1 is not None
            first = (self.w1.shape[0], self.w1.shape[1])
        if self.w2_a is None or self.w2_b is None:
            assert self.w2 is not None
            return first, tuple(self.w2.shape)
        if self.t2 is not None:
            return first, (self.w2_a.shape[1], self.w2_b.shape[1], *self.t2.shape[2:])
        return first, (self.w2_a.shape[0], *self.w2_b.shape[1:])

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in), (out, in, height, width), or (out, in * height * width) if the kernel is flattened in w2_b."""
        (rows, columns), (out, into, *kernel) = self.sizes
        return (rows * out, columns * into, *kernel)

    def fits(self, weight_shape: tuple[int, ...]) -> bool:
        """Whether the LoKr fits a weight of this shape; the kernel may be flattened in w2_b."""
        if super().fits(weight_shape) or len(weight_shape) < 3:
            return super().fits(weight_shape)
        flat = self.w2_b is not None and self.w2_b.ndim == 2 and self.t2 is None
        whole = weight_shape[1] % self.sizes[0][1] == 0  # each column of w1 must cover complete channels
        return flat and whole and (weight_shape[0], math.prod(weight_shape[1:])) == self.shape

    def factors(self, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute w1, multiplied by the scale, and w2 as dense tensors; see `sizes`.

        Args:
            dtype: The dtype of both tensors and of the arithmetic.

        Returns:
            w1 and w2.
        """
        if self.w1_a is not None and self.w1_b is not None:
            first = self.w1_a.to(dtype) @ self.w1_b.to(dtype)
        else:
            assert self.w1 is not None
            first = self.w1.to(dtype)
        return first * self.scale, self._second(dtype)

    def _dense(self, base_weight: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        first, second = self.factors(dtype)
        return torch.kron(first.reshape(*first.shape, *[1] * (second.ndim - 2)), second)

    def _second(self, dtype: torch.dtype) -> torch.Tensor:
        if self.w2_a is None or self.w2_b is None:
            assert self.w2 is not None
            return self.w2.to(dtype).contiguous()
        a, b = self.w2_a.to(dtype), self.w2_b.to(dtype)
        if self.t2 is not None:
            return contract(self.t2.to(dtype), a, b)
        return (a @ b.flatten(1)).reshape(a.shape[0], *b.shape[1:])

    def tensors(self) -> dict[str, torch.Tensor]:
        """`lokr_w1` or `lokr_w1_a` and `lokr_w1_b`, the same for w2, `lokr_t2` (if present) and `alpha`."""
        values = (self.w1, self.w1_a, self.w1_b, self.w2, self.w2_a, self.w2_b, self.t2)
        tensors = present(**dict(zip(self.suffixes, values, strict=True)))
        first = "lokr_w1" if self.w1 is not None else "lokr_w1_a"
        if self.rank is None:
            return with_alpha({**tensors, first: times(tensors[first], self.multiplier)}, self.alpha or 1.0, 1, first)
        return with_alpha(tensors, self.alpha * self.multiplier, self.rank, first)

    @classmethod
    def read(cls, tensors: Tensors) -> Self | None:
        """Read the LoKr from a module's tensors; None if they are of another kind."""
        if not any(name in tensors for name in cls.suffixes):
            return None
        check_suffixes("LoKr", tensors, (), (*cls.suffixes, "alpha"))
        w1, w1_a, w1_b, w2, w2_a, w2_b, t2 = (tensors.get(name) for name in cls.suffixes)
        factor = w2_b if w1_b is None else w1_b
        rank = factor.shape[0] if factor is not None and factor.ndim else 1
        return cls(w1, w2, alpha_of(tensors, rank), w1_a, w1_b, w2_a, w2_b, t2)
