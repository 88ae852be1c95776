"""IA3: one factor for each input or output channel of a weight (arXiv:2205.05638)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from typing_extensions import Self

from .base import TensorDelta, Tensors, check_shape, check_suffixes, scalar_of, times


@dataclass(frozen=True, eq=False, repr=False)
class IA3(TensorDelta):
    """ΔW = W · vector, for each input channel (`on_input`) or for each output channel; the bias stays.

    PEFT's factors of output channels scale the bias too (`scales_bias`); see `scaled_bias` for what that adds to it.

    `vector` is (channels,), or (1, channels, 1, 1) as LyCORIS writes it for a convolution.
    """

    kind: ClassVar[str] = "IA3"
    suffixes: ClassVar[tuple[str, ...]] = ("weight", "on_input", "ia3_l")

    vector: torch.Tensor
    on_input: bool
    scales_bias: bool = False

    def __post_init__(self) -> None:
        check_shape("weight", self.vector, (None,), (1, None), (1, None, 1), (1, None, 1, 1), (1, None, 1, 1, 1))
        self._check_floating()

    @property
    def needs_base(self) -> bool:
        """True: ΔW is a part of W."""
        return True

    @property
    def out_in(self) -> None:
        """None: it tells the channels of one side only."""

    @property
    def _made_for(self) -> str:
        return f"a weight with {self.vector.numel()} {'input' if self.on_input else 'output'} channels"

    def fits(self, weight_shape: tuple[int, ...]) -> bool:
        """Whether a weight of this shape has as many channels."""
        return len(weight_shape) > 1 and weight_shape[1 if self.on_input else 0] == self.vector.numel()

    def _dense(self, base_weight: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        assert base_weight is not None
        axis = 1 if self.on_input else 0
        factors = self.vector.to(dtype).mul(self.multiplier)
        factors = factors.reshape([-1 if i == axis else 1 for i in range(base_weight.ndim)])
        return base_weight.to(dtype, copy=True).mul_(factors)

    def tensors(self) -> dict[str, torch.Tensor]:
        """`weight` and `on_input`, 1 or 0; PEFT's `ia3_l` where it scales the bias too."""
        if self.scales_bias:
            factors = self.vector.float() * self.multiplier + 1
            return {"ia3_l": factors if factors.ndim > 1 else factors[:, None]}
        return {"on_input": torch.tensor(int(self.on_input)), "weight": times(self.vector, self.multiplier)}

    @classmethod
    def read(cls, tensors: Tensors) -> Self | None:
        """The IA3 in a module's tensors; None if there is none."""
        if "ia3_l" in tensors:
            check_suffixes("IA3", tensors, ("ia3_l",))
            return cls.of_peft(tensors["ia3_l"])
        if "on_input" not in tensors:
            return None
        check_suffixes("IA3", tensors, ("weight", "on_input"))
        return cls(tensors["weight"], scalar_of("on_input", tensors["on_input"]) != 0)

    @classmethod
    def of_peft(cls, factors: torch.Tensor, on_input: bool = False) -> Self:
        """The change of PEFT's factors, W + ΔW = W · factors.

        Args:
            factors: (out, 1) or (1, in) of a linear layer, (1, channels, 1, 1) of a convolution.
            on_input: Whether the factors of a convolution are for its input channels; PEFT's config says so, not the
                file.

        Returns:
            The change.

        Raises:
            AdapterError: The factors have another shape.
        """
        check_shape("ia3_l", factors, (None, 1), (1, None), (1, None, 1, 1))
        if factors.ndim == 2:
            on_input = factors.shape[1] > 1 or (on_input and factors.shape[0] == 1)
            factors = factors.reshape(1, -1) if on_input else factors.reshape(-1)
        return cls(factors.float() - 1, on_input, scales_bias=not on_input)
