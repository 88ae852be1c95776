"""IA3: a factor for each input or each output channel of a weight (arXiv:2205.05638)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from typing_extensions import Self

from .base import TensorDelta, Tensors, check_shape, check_suffixes, scalar_of, times


@dataclass(frozen=True, eq=False, repr=False)
class IA3(TensorDelta):
    """ΔW = W · vector, with one value for each input channel (`on_input`) or each output channel.

    PEFT's factors of output channels scale the bias too (`scales_bias`; see `scaled_bias.with_base_bias`); otherwise
    the bias does not change.

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
        """True: ΔW is W times the factors."""
        return True

    @property
    def out_in(self) -> None:
        """None: only the input or the output channels are known."""

    @property
    def _made_for(self) -> str:
        return f"a weight with {self.vector.numel()} {'input' if self.on_input else 'output'} channels"

    def fits(self, weight_shape: tuple[int, ...]) -> bool:
        """Whether a weight of this shape has the right number of channels."""
        return len(weight_shape) > 1 and weight_shape[1 if self.on_input else 0] == self.vector.numel()

    def _dense(self, base_weight: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        assert base_weight is not None
        axis = 1 if self.on_input else 0
        factors = self.vector.to(dtype).mul(self.multiplier)
        factors = factors.reshape([-1 if i == axis else 1 for i in range(base_weight.ndim)])
        return base_weight.to(dtype, copy=True).mul_(factors)

    def tensors(self) -> dict[str, torch.Tensor]:
        """`weight` and `on_input` (1 or 0), or PEFT's `ia3_l` if the bias is scaled too."""
        if self.scales_bias:
            factors = self.vector.float() * self.multiplier + 1
            return {"ia3_l": factors if factors.ndim > 1 else factors[:, None]}
        return {"on_input": torch.tensor(int(self.on_input)), "weight": times(self.vector, self.multiplier)}

    @classmethod
    def read(cls, tensors: Tensors) -> Self | None:
        """Read the IA3 from a module's tensors; None if they are of another kind."""
        if "ia3_l" in tensors:
            check_suffixes("IA3", tensors, ("ia3_l",))
            return cls.of_peft(tensors["ia3_l"])
        if "on_input" not in tensors:
            return None
        check_suffixes("IA3", tensors, ("weight", "on_input"))
        return cls(tensors["weight"], scalar_of("on_input", tensors["on_input"]) != 0)

    @classmethod
    def of_peft(cls, factors: torch.Tensor, on_input: bool = False) -> Self:
        """The change that PEFT's factors make: W + ΔW = W · factors.

        Args:
            factors: (out, 1) or (1, in) for a linear layer, (1, channels, 1, 1) for a convolution.
            on_input: Whether the factors of a convolution are for its input channels, which only PEFT's config tells.

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
