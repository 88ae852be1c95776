"""The OFT of PEFT and OneTrainer: blockwise rotations of the weight's inputs (arXiv:2306.07280, arXiv:2506.19847)."""

from dataclasses import dataclass
from math import prod, sqrt
from typing import ClassVar

import torch
from typing_extensions import Self

from lora_adapters.convert.errors import AdapterError

from .base import TensorDelta, Tensors, check_shape, check_suffixes

_TERMS = 5  # number of terms in OneTrainer's Neumann series


@dataclass(frozen=True, eq=False, repr=False)
class InputRotation(TensorDelta):
    """W + ΔW = W · diag(R₁, R₂, ...)ᵀ, where each R is computed from a skew-symmetric Q.

    Attributes:
        upper: (blocks, size * (size - 1) / 2), the elements of each Q above the diagonal, row by row. A single block
            is shared by all groups of channels.
        terms: 0 for the exact R = (I - Q) · (I + Q)⁻¹, otherwise the number of terms of PEFT's Neumann series
            R = I + 2Q + 2Q² + ... + 2Qⁿ⁻¹ + Qⁿ with n = terms - 1 (but n = 3 for three terms).
        halves_last: False for the series of PEFT before 0.18, whose last power also has the factor 2, and which ends
            with Q² for three terms.
        of_kernels: True for OneTrainer, which rotates the flattened kernel of a convolution, with R instead of Rᵀ.
            PEFT rotates the layer's input, so that its OFT is for linear layers and 1x1 convolutions only.

    A multiplier w interpolates each rotation with I: w · R + (1 - w) · I.
    """

    kind: ClassVar[str] = "OFT"
    suffixes: ClassVar[tuple[str, ...]] = ("oft_R.weight", "oft_R.scaled_oft")

    upper: torch.Tensor
    terms: int = 0
    halves_last: bool = True
    of_kernels: bool = False

    def __post_init__(self) -> None:
        check_shape("oft_R.weight", self.upper, (None, None))
        if self.size * (self.size - 1) // 2 != self.upper.shape[1]:
            raise AdapterError(
                f"oft_R.weight has the shape {list(self.upper.shape)}, expected (blocks, size * (size - 1) / 2)"
            )
        self._check_floating()

    @property
    def size(self) -> int:
        """The number of channels in a block."""
        return (1 + round((1 + 8 * self.upper.shape[1]) ** 0.5)) // 2

    @property
    def needs_base(self) -> bool:
        """True: W is rotated."""
        return True

    @property
    def out_in(self) -> None:
        """None: only the input channels are known."""

    @property
    def _made_for(self) -> str:
        layer = "a weight" if self.of_kernels else "the weight of a linear layer or 1x1 convolution"
        return f"{layer} with {len(self.upper)} blocks of {self.size} input channels"

    def fits(self, weight_shape: tuple[int, ...]) -> bool:
        """Whether a weight of this shape has the right number of input channels (times the kernel size)."""
        if len(weight_shape) < 2 or (set(weight_shape[2:]) - {1} and not self.of_kernels):
            return False
        blocks, left = divmod(prod(weight_shape[1:]), self.size)
        return left == 0 and len(self.upper) in (1, blocks)

    def _rotations(self, dtype: torch.dtype) -> torch.Tensor:
        """(R - I) times the multiplier, (blocks, size, size)."""
        dtype = torch.promote_types(dtype, torch.float32)
        rows, columns = torch.triu_indices(self.size, self.size, 1, device=self.upper.device)
        skew = torch.zeros(len(self.upper), self.size, self.size, dtype=dtype, device=self.upper.device)
        blocks = torch.arange(len(skew), device=skew.device)[:, None]
        skew = skew.index_put((blocks, rows, columns), self.upper.to(dtype))
        skew = skew - skew.mT
        if self.terms == 0:
            identity = torch.eye(self.size, dtype=dtype, device=skew.device)
            return (torch.linalg.solve(identity + skew, identity - skew) - identity) * self.multiplier
        halves = self.halves_last and self.terms > 2
        highest = max(self.terms - 1, 3) if halves else self.terms - 1
        power, total = skew, torch.zeros_like(skew)
        for exponent in range(1, highest + 1):
            total = total + (power if halves and exponent == highest else 2 * power)
            power = power @ skew
        return total * self.multiplier

    def _dense(self, base_weight: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        assert base_weight is not None
        base = base_weight.to(dtype).flatten(1)
        groups = base.reshape(len(base), -1, self.size)
        turns = self._rotations(dtype).to(dtype).expand(groups.shape[1], -1, -1)
        if self.of_kernels and base_weight.ndim > 2:
            turns = turns.mT
        return torch.einsum("ogc,gkc->ogk", groups, turns).reshape(base.shape)

    def tensors(self) -> dict[str, torch.Tensor]:
        """`oft_R.weight`, as OneTrainer writes it; AdapterError for PEFT's OFT, whose options need PEFT's config."""
        self._check_unscaled()
        if not self.of_kernels:
            raise AdapterError("PEFT's OFT rotates inputs, which LyCORIS files cannot store: keep PEFT's folder")
        return {"oft_R.weight": self.upper}

    @classmethod
    def read(cls, tensors: Tensors) -> Self | None:
        """Read OneTrainer's OFT from a module's tensors; None if they are of another kind."""
        if "oft_R.weight" not in tensors:
            return None
        check_suffixes("OFT", tensors, ("oft_R.weight",), ("oft_R.scaled_oft",))
        change = cls(tensors["oft_R.weight"], _TERMS, of_kernels=True)
        if "oft_R.scaled_oft" not in tensors:
            return change
        # `scaled_oft` marks values to be divided by 2 · √(size - 1), so that blocks of any size train alike.
        return cls(change.upper.float() / (2 * sqrt(max(change.size - 1, 1))), _TERMS, of_kernels=True)
