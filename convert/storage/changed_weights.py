"""Computing the new tensors of a checkpoint: changed, cast to another dtype, or requantised."""

import math
from collections.abc import Callable

import torch

from lora_adapters.convert.deltas.low_rank import finite
from lora_adapters.convert.errors import AdapterError
from lora_adapters.convert.families.names import ModuleName
from lora_adapters.convert.families.tensor_slice import TensorSlice

from .scaled_weights import dequantised, requantised

Change = Callable[[torch.Tensor], torch.Tensor]  # maps a module's weight to the new one, of the same shape and dtype


class Requantised:
    """A changed scaled weight. Its new scale is known once the weight has been computed."""

    def __init__(self, make: Callable[[], torch.Tensor], dtype: torch.dtype, scale: torch.Tensor, key: str) -> None:
        self._make, self._dtype, self._old, self._key = make, dtype, scale, key
        self._new: torch.Tensor | None = None

    def weight(self) -> torch.Tensor:
        """Compute the quantised weight, anew on each call."""
        number, self._new = requantised(self._make(), self._dtype, self._old, self._key)
        return number

    def scale(self) -> torch.Tensor:
        """The scale of the last computed weight."""
        assert self._new is not None
        return self._new


def unscaled(tensor: torch.Tensor, scale: torch.Tensor, key: str, *_: object, **__: object) -> torch.Tensor:
    """The float32 values of a scaled weight; takes the arguments of `tensor.to`; see `dequantised`."""
    return dequantised(tensor, scale, key)


def cast(key: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Cast a tensor to another dtype; AdapterError if a finite value would become infinite (or NaN, in float8)."""
    new = tensor.to(dtype)
    narrower = torch.finfo(dtype).max < torch.finfo(tensor.dtype).max
    if narrower and not finite(new) and bool((tensor.isfinite() & ~new.to(torch.float32).isfinite()).any()):
        raise AdapterError(f"{key} has values that are too large for {dtype}; choose another precision")
    return new


def changed(
    read: Callable[..., torch.Tensor], changes: list[tuple[TensorSlice, Change, ModuleName]], dtype: torch.dtype
) -> Callable[[], torch.Tensor]:
    """Make a function that computes the new tensor of a checkpoint from the old one.

    Args:
        read: Returns a new tensor that may be modified; takes the same arguments as `tensor.to` (dtype, copy).
        changes: At least one; for each, the slice that it changes, the change, and the module for error messages.
        dtype: The dtype of the new tensor. Changes are computed in float32, or in float64 if that is the dtype.

    Returns:
        A function without arguments that returns the new tensor, in the shape of the old one. It raises AdapterError if
        a value is NaN, infinite or too large for the dtype.
    """
    module = changes[0][2]

    def make() -> torch.Tensor:
        value = read(torch.float64 if dtype == torch.float64 else torch.float32, copy=True)
        for place, change, _ in changes:
            part = place.of(value)
            new = change(part)
            if place.swapped or new.data_ptr() != part.data_ptr():
                place.put(value, new)
        lowest, highest = (float(end) for end in value.aminmax())  # a single pass, which also propagates NaN
        if not (math.isfinite(lowest) and math.isfinite(highest)):
            raise AdapterError(f"{module}: the changed weight has NaN or infinite values")
        if max(-lowest, highest) > torch.finfo(dtype).max:
            raise AdapterError(f"{module}: the changed weight is too large for {dtype}; choose another precision")
        return value.to(dtype)

    return make
