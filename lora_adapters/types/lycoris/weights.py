"""The tensors of a change as parameters of a module."""

from collections.abc import Callable
from operator import is_
from typing import Any

import torch
from torch import nn
from typing_extensions import Self

from lora_adapters.convert.deltas.base import Delta, with_tensors


class DeltaWeights(nn.Module):
    """A change of any kind (`lora_adapters.convert.deltas.Delta`), whose tensors are this module's parameters.

    A parameter is named like its field, prefixed by the enclosing fields: "w1_a" for a LoHa, "change_w1_a" and
    "magnitude" for a DoRA with a LoHa. Gradients flow through the change's own arithmetic to all of them; other fields
    (alpha, a multiplier, a constraint) are not trained.

    Everything that uses the parameters is computed in `forward`, so that hooks on this module (offloading, sharding)
    work.

    A large tensor may stay in its file's dtype, if the file is mapped and the model's dtype needs at least as many
    bytes. It is then converted at each use, layer by layer, until it is trained or replaced.

    Args:
        change: The change.
        dtype: The model's dtype; None if no tensor may stay in its file's dtype.
    """

    model_like: torch.Tensor | None

    def __init__(self, change: Delta, dtype: torch.dtype | None = None):
        super().__init__()

        def take(name: str, tensor: torch.Tensor) -> nn.Parameter:
            self._parameters[name] = parameter = nn.Parameter(tensor)  # directly: see `types.layers.put`
            return parameter

        self._keep(with_tensors(change, take))
        waits = dtype is not None and any(_waits(tensor, dtype) for tensor in self._tensors if tensor is not None)
        # A buffer, so that it is converted with the model, by `to` and others.
        self.register_buffer("model_like", torch.empty(0, dtype=dtype) if waits else None, persistent=False)
        self._largest = max(self._parameters, key=lambda name: self.get_parameter(name).numel())

    def _keep(self, change: Delta) -> None:
        self._change, self._tensors = change, tuple(self._parameters.values())
        self._at: tuple[float, Delta] = (1.0, change)

    @property
    def weight(self) -> torch.Tensor:
        """The largest tensor. PEFT uses this name to get the dtype and device of a layer's factor.

        If the tensor is still in its file's dtype, an empty tensor in the model's dtype is returned instead, since PEFT
        would cast the inputs to the file's dtype.
        """
        largest = self.get_parameter(self._largest)
        if self._waits(largest):
            assert self.model_like is not None
            return largest.new_empty((), dtype=self.model_like.dtype).expand(largest.shape)
        return largest

    def _waits(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is still in its file's dtype."""
        return self.model_like is not None and _waits(tensor, self.model_like.dtype)

    def train(self, mode: bool = True) -> Self:
        """As for all modules; for training, tensors are converted to the model's dtype."""
        for parameter in self._parameters.values():
            if mode and parameter is not None and self._waits(parameter):
                assert self.model_like is not None
                parameter.data = parameter.data.to(self.model_like.dtype)
        return super().train(mode)

    @property
    def change(self) -> Delta:
        """The change, with the parameters as its tensors."""
        if not all(map(is_, self._parameters.values(), self._tensors)):  # parameters were replaced, as by offloading
            self._keep(with_tensors(self._change, lambda name, _: self.get_parameter(name)))
        return self._change

    def at(self, multiplier: float) -> Delta:
        """The change with a multiplier, as in LyCORIS."""
        change = self.change
        if multiplier == 1.0:
            return change
        if self._at[0] != multiplier:
            self._at = (multiplier, change.scaled(multiplier))
        return self._at[1]

    @property
    def is_altered(self) -> bool:
        """Whether hooks (dropouts) modify ΔW and Δb, so that these must be computed."""
        return bool(self._forward_hooks)

    def applied(self, multiplier: float, apply: Callable[[Delta], torch.Tensor | None]) -> torch.Tensor | None:
        """Call a function with the change at a multiplier, within `forward`, so that offloading hooks run."""
        return self((), multiplier, None, torch.float32, apply)

    @torch.no_grad()
    def replace(self, change: Delta) -> None:
        """Replace the change in place by another one of the same kind and shapes; see `is_like`."""
        new: dict[str, torch.Tensor] = {}
        with_tensors(change, lambda name, tensor: new.setdefault(name, tensor))
        for name, parameter in self._parameters.items():
            assert parameter is not None
            if self._waits(parameter):  # its dtype may be too coarse for the new values
                assert self.model_like is not None
                parameter.data = torch.empty_like(parameter, dtype=self.model_like.dtype)
            parameter.copy_(new[name])
        self._keep(with_tensors(change, lambda name, _: self.get_parameter(name)))

    def is_like(self, change: Delta) -> bool:
        """Whether `replace` accepts the change: it must be of the same kind, with tensors of the same shapes."""
        return _shapes(change) == _shapes(self.change)

    def forward(
        self,
        shape: tuple[int, ...],
        multiplier: float,
        base_weight: torch.Tensor | None,
        dtype: torch.dtype,
        apply: Callable[[Delta], torch.Tensor | None] | None = None,
    ) -> Any:
        """ΔW and Δb at a multiplier, or what `apply` returns.

        Args:
            shape: The shape of the weight W.
            multiplier: The weight of the adapter, used as LyCORIS' multiplier.
            base_weight: W, on the device of the parameters; None if ΔW does not depend on it.
            dtype: The dtype of the results and of the arithmetic.
            apply: See `applied`; its result is returned, and no ΔW is computed.

        Returns:
            ΔW in `shape`, and Δb (out,); None for each that does not change. With `apply`, its result.
        """
        change = self.at(multiplier)
        if apply is not None:
            return apply(change)
        if not change.changes_weight:
            return None, change.bias(dtype)
        weight = change.delta(base_weight, dtype) if change.needs_base else change.delta(dtype=dtype).reshape(shape)
        return weight, change.bias(dtype)


def _waits(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether a tensor is in another dtype than the model's, but not a wider one, which is chosen for training."""
    return tensor.dtype != dtype and tensor.element_size() <= dtype.itemsize


def _shapes(change: Delta) -> Any:
    """The kinds of a change and its nested changes, and the shapes of the tensors."""
    shapes: dict[str, tuple[int, ...]] = {}

    def note(name: str, tensor: torch.Tensor) -> torch.Tensor:
        shapes[name] = tuple(tensor.shape)
        return tensor

    with_tensors(change, note)
    return repr(type(change)), getattr(change, "kind", ""), shapes
