"""PEFT's BOFT, and the OFT of PEFT 0.14 and 0.15: rotations of the weight's input channels, and a factor for each
output channel (arXiv:2311.06243, arXiv:2306.07280)."""

from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch

from lora_adapters.convert.errors import AdapterError

from .base import TensorDelta, Tensors, check_shape, check_suffixes
from .oft import OFT, rotations


@dataclass(frozen=True, eq=False, repr=False)
class InputButterfly(TensorDelta):
    """W + ΔW = factors · W · (Bₙ · ... · B₂ · B₁)ᵀ, over the flattened kernel of a convolution.

    `blocks` is (stages, count, size, size). Stage i (from 0) splits the channels into half-blocks of size / 2, pairs
    those that are 2ⁱ half-blocks apart, and multiplies each pair by its R = (I - Q) · (I + Q)⁻¹ with
    Q = (block - blockᵀ) / 2. If there is only one stage, it rotates adjacent channels; if that has only one block, the
    block is shared by all groups of channels. `factors` is (out, 1), or (1, out) as PEFT writes them for convolutions.

    A multiplier w interpolates each rotation with I, w · R + (1 - w) · I, and each factor with 1.
    """

    kind: ClassVar[str] = "BOFT"
    suffixes: ClassVar[tuple[str, ...]] = ("boft_R", "boft_s", "oft_r", "oft_s")

    blocks: torch.Tensor
    factors: torch.Tensor

    def __post_init__(self) -> None:
        check_shape("boft_R", self.blocks, (None, None, None, None))
        stages, count, size, columns = self.blocks.shape
        check_shape("boft_s", self.factors, (None, 1), (1, None))
        if size != columns or (stages > 1 and (size % 2 or count % 2 ** (stages - 1))):
            raise AdapterError(
                f"boft_R has the shape {list(self.blocks.shape)}, expected (stages, count, size, size); "
                "more than one stage needs an even size and a count divisible by 2 ** (stages - 1)"
            )
        self._check_floating()

    @property
    def needs_base(self) -> bool:
        """True: W is rotated."""
        return True

    @property
    def out_in(self) -> tuple[int, int] | None:
        """Output channels and input channels times the kernel size; None if one block is shared by all channels."""
        stages, count, size, _ = self.blocks.shape
        return None if (stages, count) == (1, 1) else (self.factors.numel(), count * size)

    @property
    def _made_for(self) -> str:
        _, count, size, _ = self.blocks.shape
        return f"a weight with {self.factors.numel()} output channels and {count} blocks of {size} inputs"

    def fits(self, weight_shape: tuple[int, ...]) -> bool:
        """Whether a weight of this shape has the right number of output channels and of inputs (with the kernel)."""
        if len(weight_shape) < 2 or weight_shape[0] != self.factors.numel():
            return False
        stages, count, size, _ = self.blocks.shape
        blocks, left = divmod(prod(weight_shape[1:]), size)
        return left == 0 and (count == blocks or (stages, count) == (1, 1))

    def _dense(self, base_weight: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        assert base_weight is not None
        base = base_weight.to(dtype).flatten(1)
        stages, _, size, _ = self.blocks.shape
        turns = rotations(self.blocks / -2, 0.0, dtype)  # `rotations` has the opposite sign of Q
        rows = base
        for stage, turn in enumerate(turns):
            rows = _paired(rows, 2**stage, size // 2) if stages > 1 else rows
            groups = rows.reshape(len(rows), -1, size)
            turned = torch.einsum("ogc,gkc->ogk", groups, turn.expand(groups.shape[1], -1, -1)) - groups
            rows = (groups + self.multiplier * turned).reshape(base.shape)
            rows = _parted(rows, 2**stage, size // 2) if stages > 1 else rows
        factors = 1 + self.multiplier * (self.factors.to(dtype).reshape(-1, 1) - 1)
        return rows * factors - base

    def tensors(self) -> dict[str, torch.Tensor]:
        """`boft_R` and `boft_s`, as PEFT names them."""
        self._check_unscaled()
        return {"boft_R": self.blocks, "boft_s": self.factors}

    @classmethod
    def read(cls, tensors: Tensors) -> TensorDelta | None:
        """Read the rotations from a module's tensors; None if they are of another kind."""
        if "boft_R" in tensors:
            check_suffixes("BOFT", tensors, ("boft_R", "boft_s"))
            return cls(tensors["boft_R"], tensors["boft_s"])
        if "oft_r" not in tensors:
            return None
        check_suffixes("OFT", tensors, ("oft_r",), ("oft_s",))
        blocks = tensors["oft_r"]
        check_shape("oft_r", blocks, (None, None, None))
        if "oft_s" in tensors:
            return _OldOFT(blocks[None], tensors["oft_s"])
        # Before PEFT 0.14, OFT rotates output channels: the same as LyCORIS' OFT with blocks divided by -2.
        return OFT(blocks.float() / -2)


@dataclass(frozen=True, eq=False, repr=False)
class _OldOFT(InputButterfly):
    """The OFT of PEFT 0.14 and 0.15, which is a BOFT with one stage."""

    kind: ClassVar[str] = "OFT"

    def tensors(self) -> dict[str, torch.Tensor]:
        """`oft_r` and `oft_s`, as PEFT 0.14 and 0.15 name them."""
        self._check_unscaled()
        return {"oft_r": self.blocks[0], "oft_s": self.factors}


def _paired(rows: torch.Tensor, distance: int, half: int) -> torch.Tensor:
    """Reorder the columns so that half-blocks that are `distance` apart are next to each other."""
    return rows.reshape(len(rows), -1, 2, distance, half).transpose(2, 3).reshape(rows.shape)


def _parted(rows: torch.Tensor, distance: int, half: int) -> torch.Tensor:
    """The inverse of `_paired`."""
    return rows.reshape(len(rows), -1, distance, 2, half).transpose(2, 3).reshape(rows.shape)
