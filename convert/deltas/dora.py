"""DoRA: a magnitude for each row or column of the changed weight (arXiv:2402.09353)."""

from dataclasses import dataclass, replace

import torch
from typing_extensions import Self

from lora_adapters.convert.errors import AdapterError

from .wrapper import Wrapper


@dataclass(frozen=True, eq=False, repr=False)
class DoRA(Wrapper):
    """W + ΔW = (W + change) · m / ‖W + change‖, where `change` is another delta.

    The magnitude m is (out, 1, ...), with a norm for each output channel (LyCORIS' `wd_on_output`, PEFT's DoRA), or
    (1, in, ...), with a norm for each input channel.

    A multiplier w scales only the distance of the factor m / ‖W + change‖ from 1, as in LyCORIS:
    W + ΔW = (W + change) · (1 + w · (m / ‖W + change‖ - 1)). The change itself is not scaled, even at w = 0.
    With `scales_change`, as in PEFT's files, the multiplier scales the change instead, as in PEFT:
    W + ΔW = (W + w · change) · m / ‖W + w · change‖.
    """

    magnitude: torch.Tensor
    multiplier: float = 1.0
    scales_change: bool = False

    def __post_init__(self) -> None:
        shape = tuple(self.magnitude.shape)
        if len(shape) < 2 or self.magnitude.numel() != max(shape[:2]) or 0 in shape:
            raise AdapterError(f"dora_scale has the shape {list(shape)}, expected [out, 1, ...] or [1, in, ...]")
        if not self.magnitude.is_floating_point():
            raise AdapterError(f"dora_scale must be floating point, not {self.magnitude.dtype}")

    @property
    def kind(self) -> str:
        """ "DoRA", whatever the kind of the inner change."""
        return "DoRA"

    @property
    def rank(self) -> int | None:
        """The rank of the change before the magnitude is applied; ΔW itself has no rank."""
        return self.change.rank

    @property
    def changes_weight(self) -> bool:
        """True: the magnitude rescales the weight."""
        return True

    @property
    def needs_base(self) -> bool:
        """True: the norm depends on the weight."""
        return True

    def delta(self, base_weight: torch.Tensor | None = None, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """ΔW as a dense tensor; see `Delta.delta`."""
        if base_weight is None:
            raise AdapterError("the change of a DoRA module depends on the model's weight: pass base_weight")
        if self.change.fits(tuple(base_weight.shape)) and not self.fits(tuple(base_weight.shape)):
            shapes = f"{list(self.magnitude.shape)}, but the model's weight is {list(base_weight.shape)}"
            raise AdapterError(f"dora_scale has the shape {shapes}")
        weight = self.change.delta(base_weight, dtype) + base_weight
        kept = 0 if self._on_output(tuple(weight.shape)) else 1
        norm = torch.linalg.vector_norm(weight, dim=[i for i in range(weight.ndim) if i != kept], keepdim=True)
        factor = self.magnitude.to(dtype).reshape(norm.shape) / (norm + torch.finfo(dtype).eps)
        # Not in place: the gradient of the norm needs the unmodified weight.
        return (weight * factor.sub(1).mul_(self.multiplier).add_(1)).sub_(base_weight)

    def _on_output(self, weight_shape: tuple[int, ...]) -> bool:
        """Whether m has one value for each output channel of a weight of this shape."""
        return tuple(self.magnitude.shape[:2]) == (weight_shape[0], 1)

    def bias(self, dtype: torch.dtype = torch.float32) -> torch.Tensor | None:
        """The inner delta's change of the bias, times the multiplier."""
        bias = self.change.bias(dtype)
        return None if bias is None else bias.mul_(self.multiplier)

    def scaled(self, weight: float) -> Self:
        """The delta multiplied by `weight`, as the class describes."""
        if self.scales_change:
            return replace(self, change=self.change.scaled(weight))
        return replace(self, multiplier=self.multiplier * weight)

    def fits(self, weight_shape: tuple[int, ...]) -> bool:
        """Whether the change and the magnitude fit a weight of this shape."""
        if len(weight_shape) < 2 or not self.change.fits(weight_shape):
            return False
        return self._on_output(weight_shape) or tuple(self.magnitude.shape[:2]) == (1, weight_shape[1])

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of the change, and `dora_scale`."""
        if self.multiplier != 1:
            raise AdapterError(
                f"a DoRA at weight {self.multiplier:g} cannot be written: files of this kind cannot store a multiplier"
            )
        return {**self.change.tensors(), "dora_scale": self.magnitude}


def magnitude_of_vector(vector: torch.Tensor) -> torch.Tensor:
    """PEFT's `lora_magnitude_vector`, (out,) or (1, out, 1, 1), as a magnitude: (out, 1) or (out, 1, 1, 1)."""
    if vector.ndim == 0 or vector.numel() != max(vector.shape):
        raise AdapterError(
            f"lora_magnitude_vector has the shape {list(vector.shape)}, expected [out] or [1, out, 1, 1]"
        )
    return vector.reshape(-1, *[1] * (max(vector.ndim, 2) - 1))
