"""OFT: blockwise rotations of the weight's rows (arXiv:2306.07280; LyCORIS' "diag-oft")."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from typing_extensions import Self

from lora_adapters.convert.errors import AdapterError

from .base import TensorDelta, Tensors, check_shape, check_suffixes, present, scalar_of


def rotations(blocks: torch.Tensor, limit: float, dtype: torch.dtype) -> torch.Tensor:
    """The rotation of each block, the Cayley transform R = (I + Q) · (I - Q)⁻¹ with Q = block - blockᵀ.

    Args:
        blocks: (..., size, size).
        limit: The largest norm of all Q together; 0 means no limit.
        dtype: The dtype of the result; the computation uses at least float32.

    Returns:
        The rotations, in the shape of `blocks`.
    """
    blocks = blocks.to(torch.promote_types(dtype, torch.float32))
    skew = blocks - blocks.mT
    if limit > 0:
        skew = skew * (limit / torch.linalg.vector_norm(skew).clamp(min=limit))
    identity = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    return torch.linalg.solve(identity - skew, identity + skew).to(dtype)  # both factors commute


@dataclass(frozen=True, eq=False, repr=False)
class Rotation(TensorDelta):
    """Base class of OFT and BOFT: blocks that rotate rows, followed by an optional factor for each row.

    `blocks` is (..., count, size, size) with count * size = out. `rescale` is (out, 1, ...). `constraint` limits the
    norm of Q to constraint * out; 0 means no limit. LyCORIS' files store it as alpha.

    A multiplier w interpolates each rotation with I, w · R + (1 - w) · I, as in LyCORIS; `rescale` is not affected.
    """

    blocks: torch.Tensor
    constraint: float = 0.0
    rescale: torch.Tensor | None = None

    suffixes: ClassVar[tuple[str, ...]] = ("oft_blocks", "rescale")
    block_shape: ClassVar[tuple[None, ...]]

    def __post_init__(self) -> None:
        check_shape("oft_blocks", self.blocks, self.block_shape)
        check_shape("oft_blocks", self.blocks, (*self.blocks.shape[:-1], self.blocks.shape[-2]))
        if self.rescale is not None:
            rows = self._rows
            check_shape("rescale", self.rescale, *((rows, *[1] * dims) for dims in range(5)))
        if not math.isfinite(self.constraint):
            raise AdapterError(f"alpha is {self.constraint}")
        self._check_floating()

    @property
    def needs_base(self) -> bool:
        """True: W is rotated."""
        return True

    @property
    def _rows(self) -> int:
        return self.blocks.shape[-3] * self.blocks.shape[-2]

    @property
    def out_in(self) -> None:
        """None: only the output channels are known."""

    @property
    def _made_for(self) -> str:
        return f"a weight with {self._rows} output channels"

    def fits(self, weight_shape: tuple[int, ...]) -> bool:
        """Whether a weight of this shape has the right number of output channels."""
        return len(weight_shape) > 1 and weight_shape[0] == self._rows

    def _rotations(self, dtype: torch.dtype) -> torch.Tensor:
        """(R - I) times the multiplier."""
        turns = rotations(self.blocks, self.constraint * self._rows, dtype)
        return (turns - torch.eye(turns.shape[-1], dtype=dtype, device=turns.device)).mul_(self.multiplier)

    def _rescaled(self, change: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        """Apply `rescale` to the change of the rows: rescale · (W + change) - W; all are (out, columns)."""
        if self.rescale is None:
            return change
        factor = self.rescale.to(change.dtype).reshape(-1, 1)
        return change.mul_(factor).add_(base * (factor - 1))

    def tensors(self) -> dict[str, torch.Tensor]:
        """`oft_blocks`, `rescale` (if present) and `alpha`, which stores the constraint."""
        self._check_unscaled()
        alpha = torch.tensor(self.constraint, dtype=torch.float32)
        return {"alpha": alpha, "oft_blocks": self.blocks, **present(rescale=self.rescale)}

    @classmethod
    def read(cls, tensors: Tensors) -> Self | None:
        """Read the rotations from a module's tensors; None if they are of another kind."""
        if "oft_blocks" not in tensors or tensors["oft_blocks"].ndim != len(cls.block_shape):
            return None
        check_suffixes(cls.kind, tensors, ("oft_blocks",), ("rescale", "alpha"))
        constraint = scalar_of("alpha", tensors["alpha"]) if "alpha" in tensors else 0.0
        return cls(tensors["oft_blocks"], constraint, tensors.get("rescale"))


@dataclass(frozen=True, eq=False, repr=False)
class OFT(Rotation):
    """W + ΔW = rescale · diag(R₁ᵀ, R₂ᵀ, ...) · W, with `blocks` (count, size, size); see `Rotation`."""

    kind: ClassVar[str] = "OFT"
    block_shape: ClassVar[tuple[None, ...]] = (None, None, None)

    def _dense(self, base_weight: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        assert base_weight is not None
        base = base_weight.to(dtype).flatten(1)
        count, size, _ = self.blocks.shape
        change = torch.bmm(self._rotations(dtype).mT, base.reshape(count, size, -1))
        return self._rescaled(change.reshape(base.shape), base)
