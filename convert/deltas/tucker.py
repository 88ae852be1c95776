"""LoRA of a convolution whose kernel is Tucker-decomposed (LyCORIS' LoCon with `use_tucker`)."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from lora_adapters.convert.deltas.low_rank import LowRank, with_alpha
from lora_adapters.convert.errors import AdapterError

from .base import TensorDelta, Tensors, alpha_of, check_matrix_like, check_suffixes


def contract(core: torch.Tensor, out_factor: torch.Tensor, in_factor: torch.Tensor) -> torch.Tensor:
    """A weight from its Tucker decomposition, W[o, i, ...] = Σ_pq core[p, q, ...] · out_factor[p, o] · in_factor[q, i].

    Args:
        core: (rank, rank, height, width).
        out_factor: (rank, out).
        in_factor: (rank, in).

    Returns:
        (out, in, height, width).
    """
    half = torch.einsum("pq...,qi->pi...", core, in_factor)
    return (out_factor.T @ half.flatten(1)).reshape(out_factor.shape[1], *half.shape[1:])


@dataclass(frozen=True, eq=False, repr=False)
class Tucker(TensorDelta):
    """ΔW = (alpha / rank) · mid ×₁ up ×₂ down: a LoRA of a convolution with three factors.

    `down` is (rank, in, 1, 1), `mid` is (rank, rank, height, width), `up` is (out, rank, 1, 1).
    """

    kind: ClassVar[str] = "LoRA"
    suffixes: ClassVar[tuple[str, ...]] = ("lora_down.weight", "lora_up.weight", "lora_mid.weight")

    down: torch.Tensor
    mid: torch.Tensor
    up: torch.Tensor
    alpha: float

    def __post_init__(self) -> None:
        check_matrix_like("lora_down.weight", self.down)
        check_matrix_like("lora_up.weight", self.up, columns=self.rank)
        if self.mid.ndim < 3 or tuple(self.mid.shape[:2]) != (self.rank, self.rank) or 0 in self.mid.shape:
            raise AdapterError(f"lora_mid.weight has the shape {list(self.mid.shape)}, but the rank is {self.rank}")
        if not math.isfinite(self.alpha):
            raise AdapterError(f"alpha is {self.alpha}")
        self._check_floating()

    @property
    def rank(self) -> int:
        """The number of components."""
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in, height, width)."""
        return (self.up.shape[0], self.down.shape[1], *self.mid.shape[2:])

    def low_rank(self) -> LowRank:
        """The exact ΔW as a low-rank pair of the same rank: `mid` and `down` are multiplied, in float32."""
        down = torch.einsum("pq...,qi->pi...", self.mid.float(), self.down.float().flatten(1))
        return LowRank(down, self.up, self.alpha * self.multiplier)

    def _dense(self, base_weight: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        up, down = self.up.to(dtype).flatten(1), self.down.to(dtype).flatten(1)
        return contract(self.mid.to(dtype), up.T, down).mul_(self.alpha * self.multiplier / self.rank)

    def tensors(self) -> dict[str, torch.Tensor]:
        """`lora_down.weight`, `lora_mid.weight`, `lora_up.weight` and `alpha`."""
        tensors = {"lora_down.weight": self.down, "lora_mid.weight": self.mid, "lora_up.weight": self.up}
        return with_alpha(tensors, self.alpha * self.multiplier, self.rank, "lora_up.weight")


def read_lora(tensors: Tensors) -> LowRank | Tucker | None:
    """Read the LoRA from a module's tensors; None if they are of another kind."""
    if not any(name in tensors for name in Tucker.suffixes):
        return None
    check_suffixes("LoRA", tensors, Tucker.suffixes[:2], ("lora_mid.weight", "alpha"))
    down, up = tensors["lora_down.weight"], tensors["lora_up.weight"]
    if down.ndim == 0:
        raise AdapterError("lora_down.weight is a scalar, expected a matrix or a kernel")
    alpha = alpha_of(tensors, down.shape[0])
    if "lora_mid.weight" in tensors:
        return Tucker(down, tensors["lora_mid.weight"], up, alpha)
    return LowRank(down, up, alpha)
