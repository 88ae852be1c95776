"""Dense changes of a weight (LyCORIS' "full", ComfyUI's `diff`), and changes of biases."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from typing_extensions import Self

from lora_adapters.convert.errors import AdapterError

from .base import TensorDelta, Tensors, check_shape, check_suffixes, times, with_article
from .wrapper import Wrapper


@dataclass(frozen=True, eq=False, repr=False)
class Full(TensorDelta):
    """ΔW = diff, in the shape of the weight, and Δb = diff_b, (out,). Either may be None."""

    kind: ClassVar[str] = "full"
    suffixes: ClassVar[tuple[str, ...]] = ("diff", "diff_b")

    diff: torch.Tensor | None
    diff_b: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.diff is None and self.diff_b is None:
            raise AdapterError(f"a {self.kind} module needs {' or '.join(self.suffixes)}")
        if self.diff is not None and (self.diff.ndim == 0 or 0 in self.diff.shape):
            raise AdapterError(f"{self.suffixes[0]} has the shape {list(self.diff.shape)}, expected a non-empty tensor")
        if self.diff_b is not None:
            check_shape(self.suffixes[1], self.diff_b, (None if self.diff is None else self.diff.shape[0],))
        self._check_floating()

    @property
    def needs_base(self) -> bool:
        """Whether only the bias changes: the shape of ΔW is then not in the file."""
        return self.diff is None

    @property
    def changes_weight(self) -> bool:
        """Whether `diff` is present."""
        return self.diff is not None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight; (out,) if only the bias changes."""
        tensor = self.diff_b if self.diff is None else self.diff
        assert tensor is not None
        return tuple(tensor.shape)

    @property
    def _made_for(self) -> str:
        return f"a bias of {list(self.shape)}" if self.diff is None else super()._made_for

    def fits(self, weight_shape: tuple[int, ...]) -> bool:
        """Whether the change fits a weight of this shape, or its bias."""
        return self.shape == weight_shape[:1] if self.diff is None else super().fits(weight_shape)

    def _dense(self, base_weight: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        if self.diff is None:
            assert base_weight is not None
            return torch.zeros(base_weight.shape, dtype=dtype, device=base_weight.device)
        copy = self.diff.to(dtype, copy=True)
        return copy if self.multiplier == 1 else copy.mul_(self.multiplier)

    def bias(self, dtype: torch.dtype = torch.float32) -> torch.Tensor | None:
        """Δb, (out,); None if the bias does not change."""
        return None if self.diff_b is None else self.diff_b.to(dtype, copy=True).mul_(self.multiplier)

    def tensors(self) -> dict[str, torch.Tensor]:
        """`diff` and `diff_b`, without those that are None."""
        named = zip(self.suffixes, (self.diff, self.diff_b), strict=True)
        return {name: times(tensor, self.multiplier) for name, tensor in named if tensor is not None}

    @classmethod
    def read(cls, tensors: Tensors) -> Self | None:
        """Read the change from a module's tensors; None if they are of another kind."""
        if not any(name in tensors for name in cls.suffixes):
            return None
        check_suffixes(cls.kind, tensors, (), cls.suffixes)
        weight, bias = cls.suffixes
        return cls(tensors.get(weight), tensors.get(bias))


@dataclass(frozen=True, eq=False, repr=False)
class WithBias(Wrapper):
    """Another delta combined with a change of the bias, Δb = diff_b, (out,) (ComfyUI's `bias_diff`)."""

    diff_b: torch.Tensor
    multiplier: float = 1.0  # of the bias only; `change` has its own multiplier

    def __post_init__(self) -> None:
        if self.change.bias() is not None:
            raise AdapterError(f"{with_article(self.change.kind)} module has both diff_b and another bias")
        check_shape("diff_b", self.diff_b, (None,))
        if not self.diff_b.is_floating_point():
            raise AdapterError(f"diff_b must be floating point, not {self.diff_b.dtype}")

    def delta(self, base_weight: torch.Tensor | None = None, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """ΔW as a dense tensor; see `Delta.delta`."""
        if base_weight is not None and self.change.fits(shape := tuple(base_weight.shape)) and not self.fits(shape):
            shapes = f"{list(self.diff_b.shape)}, but the model's weight is {list(shape)}"
            raise AdapterError(f"diff_b has the shape {shapes}")
        return self.change.delta(base_weight, dtype)

    def bias(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Δb, (out,)."""
        return self.diff_b.to(dtype, copy=True).mul_(self.multiplier)

    def scaled(self, weight: float) -> Self:
        """Both changes multiplied by `weight`."""
        return replace(self, change=self.change.scaled(weight), multiplier=self.multiplier * weight)

    def fits(self, weight_shape: tuple[int, ...]) -> bool:
        """Whether both changes fit a weight of this shape and its bias."""
        return self.change.fits(weight_shape) and weight_shape[0] == self.diff_b.shape[0]

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of the change, and `diff_b`."""
        return {**self.change.tensors(), "diff_b": times(self.diff_b, self.multiplier)}
