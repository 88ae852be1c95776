"""Fuses adapters into the weights of a pipeline so that unfusing restores the weights bit for bit.

Subtracting the fused change would leave rounding errors in the weights, which accumulate each time. So the original
weights of the adapted layers are kept in CPU memory until the adapter is unfused or its layers are removed. With
`pipe.fuse_lora(keep_weights=False)` they are not kept, and unfusing subtracts the change.

All adapters of a layer are fused in one addition, by stacking their factors. This applies to diffusers' `fuse_lora` of
pipelines and models; PEFT's own functions merge as before.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from lora_adapters.convert.errors import AdapterError
from lora_adapters.types.found_layers import lora_layers
from lora_adapters.types.layers import factors
from lora_adapters.types.lycoris.layer import before_key
from lora_adapters.types.lycoris.operations import computable, is_quantised

Method = Callable[..., Any]
_keeps: ContextVar[bool | None] = ContextVar("keeps", default=None)  # None outside of diffusers' fusing
_KEPT = "_lora_adapters_kept"  # the attribute of a layer with the values that fusing overwrote


@dataclass(frozen=True)
class _Kept:
    """The original weight and bias of a layer, and the versions of the tensors after fusing."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    fused: tuple[Any, ...]

    def is_of(self, base: Any) -> bool:
        """Whether the layer is unchanged since it was fused."""
        return self.fused == _versions(base) and self.weight.shape == base.weight.shape

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """Pickles and copies of the layer do not contain the kept weights, so that they load without this package."""
        return dict, ()

    def restore(self, base: Any) -> None:
        base.weight.data.copy_(self.weight)
        if self.bias is not None:
            base.bias.data.copy_(self.bias)


def _versions(base: Any) -> tuple[Any, ...]:
    """The parameters and their in-place version counters (changes through `.data` are not counted)."""
    return tuple((id(parameter), parameter._version) for parameter in (base.weight, base.bias) if parameter is not None)


def kept_of(layer: Any) -> Any:
    """The values that fusing overwrote in a layer, for `keep`; None if they were not kept."""
    return vars(layer).get(_KEPT) or None


def keep(layer: Any, kept: Any) -> None:
    """Restore the result of `kept_of`, after the layer has been restored to its state at that time."""
    vars(layer).pop(_KEPT, None)
    if kept is not None:
        vars(layer)[_KEPT] = kept


# --- what diffusers calls -----------------------------------------------------------------------------------------


def fusing(stock: Method) -> Method:
    """Wraps diffusers' functions that fuse layers, so that they fuse as described in this module."""
    signature = inspect.signature(stock)

    def fuse(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind_partial(*args, **kwargs).arguments
        # The model is the first argument, whatever its name. A pipeline's `fuse_lora` has checked it already.
        if given and _keeps.get() is None:
            _check_layers(next(iter(given.values())), given.get("adapter_names"))
        with _keeping(_keeps.get() is not False):
            return stock(*args, **kwargs)

    return fuse


def fusing_pipelines(stock: Method) -> Method:
    """Wraps the `fuse_lora` of pipelines."""
    signature = inspect.signature(stock)

    def fuse_lora(self: Any, *args: Any, keep_weights: bool = True, **kwargs: Any) -> Any:
        given = signature.bind_partial(self, *args, **kwargs).arguments
        for name in given.get("components") or ():  # check all of them before the first is changed
            model = getattr(self, name, None)
            if isinstance(model, nn.Module):
                _check_layers(model, given.get("adapter_names"))
        with _keeping(keep_weights):
            return stock(self, *args, **kwargs)

    return fuse_lora


def _check_layers(model: nn.Module, adapter_names: list[str] | None) -> None:
    for path, layer in lora_layers(model):
        names = layer.active_adapters if adapter_names is None else adapter_names
        if any(name in layer.lora_A for name in names):
            _check(layer, path)


def _check(layer: Any, path: str) -> None:
    """Raise AdapterError if a layer is quantised in such a way that nothing can be added to its weight.

    PEFT would add the change to the quantised codes, or to a temporary copy.
    """
    weight = getattr(layer.get_base_layer(), "weight", None)
    # PEFT's other classes are for specific kinds of quantised layers, and merge or refuse themselves; torchao's can
    # merge if it is told how to requantise.
    if not isinstance(layer, Linear) or not isinstance(weight, torch.Tensor) or not is_quantised(weight):
        return
    if getattr(layer, "get_apply_tensor_subclass", None) is None:
        raise AdapterError(
            f"{path} is quantised ({type(weight).__name__}), and an adapter cannot be fused into it: use the adapter "
            "without fusing, or load the model without quantisation"
        )


@contextmanager
def _keeping(keeps: bool) -> Iterator[None]:
    token = _keeps.set(keeps)
    try:
        yield
    finally:
        _keeps.reset(token)


# --- what PEFT's layers do -----------------------------------------------------------------------------------------


def merging(stock: Method) -> Method:
    """Wraps the `merge` of PEFT's layers for linear layers and convolutions."""

    def merge(self: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        keeps, base = _keeps.get(), self.get_base_layer()
        names = self.active_adapters if adapter_names is None else adapter_names
        if keeps is None:  # otherwise all layers were checked before the first one was merged
            _check(self, f"a {type(base).__name__}")
        if keeps is None or not _is_plain(base) or not any(name in self.lora_A for name in names):
            stock(self, safe_merge, adapter_names)
            return
        kept = kept_of(self)
        if self.merged_adapters and (kept is None or not kept.is_of(base)):
            keeps = False  # the weight already contains a fused change, and the original is not known
        elif keeps and kept is None:
            bias = getattr(base, "bias", None)  # some kinds of adapters change the bias
            kept = _Kept(_copy(base.weight), None if bias is None else _copy(bias), ())
        done = False
        try:
            if safe_merge or not _add(self, base, adapter_names):
                stock(self, safe_merge, adapter_names)
            done = True
        finally:
            if kept is not None and not done and not self.merged_adapters:
                kept.restore(base)  # undo an addition that failed half-way
            vars(self).pop(_KEPT, None)
            if keeps and kept is not None and self.merged_adapters:
                vars(self)[_KEPT] = _Kept(kept.weight, kept.bias, _versions(base))

    return merge


def unmerging(stock: Method) -> Method:
    """Wraps the `unmerge` of these layers."""

    def unmerge(self: Any) -> None:
        kept, base = kept_of(self), self.get_base_layer()
        vars(self).pop(_KEPT, None)
        if kept is None or not self.merged_adapters or not kept.is_of(base):
            stock(self)
            return
        kept.restore(base)
        for name in self.merged_adapters:
            self._caches.pop(before_key(name), None)
        self.merged_adapters.clear()

    return unmerge


def _is_plain(base: nn.Module) -> bool:
    """Whether this is torch's own layer with a plain weight in memory."""
    if type(base) not in (nn.Linear, nn.Conv2d) or type(base.weight) is not nn.Parameter:
        return False
    return not (base.weight.is_meta or base.weight.is_inference())


def _copy(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.detach().to("cpu", copy=True)


@torch.no_grad()
def _add(layer: Any, base: Any, adapter_names: list[str] | None) -> bool:
    """Add adapters to the weight in a single addition if all are plain low-rank pairs; returns whether they are."""
    if isinstance(adapter_names, str) or layer.merged_adapters or getattr(base, "groups", 1) != 1:
        return False
    names = [name for name in check_adapters_to_merge(layer, adapter_names) if name in layer.lora_A]
    if any(name in layer.lora_variant or layer.lora_bias[name] for name in names):
        return False
    weight, downs, ups = base.weight.data, [], []
    # In float32, as in PEFT: in half precision, sums are slow on many CPUs, and rounded more often.
    wide = torch.float32 if weight.dtype.itemsize < 4 else weight.dtype
    for name in names:
        down, up = (part.weight for part in factors(layer, name))
        if down.device != weight.device or down.dim() != weight.dim():
            return False
        downs.append(down.flatten(1).to(wide) * float(layer.scaling[name]))
        ups.append(up.flatten(1).to(wide))
    # Summed before it is added to the weight, since adding each component to the large weight would round more.
    delta = (torch.cat(ups, 1) @ torch.cat(downs)).view(weight.shape)
    if weight.dtype == wide:
        weight.add_(delta)
    else:
        weight.copy_(delta.add_(computable(weight)))
    layer.merged_adapters.extend(names)
    return True
