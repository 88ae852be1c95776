"""Falling back to diffusers for adapters that this package cannot load but PEFT's layers support.

Examples are convolutions in one or three dimensions and layers of other types. diffusers skips tensors that it does not
know with a log message, or without one. So the result is compared with the file: if a tensor or a scale is missing in
the layers, everything is undone and an error is raised.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from lora_adapters.convert.errors import AdapterError, UnknownFormatError
from lora_adapters.convert.formats.diffusers import alpha_of
from lora_adapters.types.layers import DOWN_HELD, HELD

from .model_state import ModelState


class RefusedError(UnknownFormatError, RuntimeError):
    """Neither this package nor diffusers can load an adapter; also a RuntimeError, which diffusers and torch raise."""


def load(
    models: Mapping[str, nn.Module],
    stock: Callable[[], None],
    adapter_name: str,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str],
    reason: AdapterError,
) -> None:
    """Let diffusers load an adapter, all of it or nothing.

    Args:
        models: The models of the pipeline by component.
        stock: Loads the adapter into the models.
        adapter_name: The name that `stock` uses, which must be unused in the models.
        tensors: The tensors of the file.
        metadata: The metadata of the file.
        reason: The error of this package for the file.

    Raises:
        AdapterError: `reason`, if diffusers fails or does not load every tensor with its scale. The models are then
            unchanged.
    """
    before = {component: ModelState.of(model) for component, model in models.items()}
    try:
        try:
            stock()
        except Exception as error:
            raise reason from error
        lost = _lost(models, adapter_name, tensors, metadata)
        if lost is not None:
            raise AdapterError(f"{reason}; diffusers skips or changes {lost:.100}")
    except BaseException:
        for component, state in before.items():
            state.restore(models[component])
        raise


def leave(
    models: Mapping[str, nn.Module],
    stock: Callable[[], None],
    reason: AdapterError,
    contents: Callable[[], Mapping[str, torch.Tensor]],
) -> None:
    """Let diffusers load what it can, for a transformer whose files it converts itself; the result is not checked.

    Args:
        models: The models of the pipeline by component.
        stock: Loads the adapter into the models.
        reason: The error of this package for the file.
        contents: Returns the tensors of the file. If none of them is for a layer, it is not an error if nothing is
            loaded.

    Raises:
        AdapterError: `reason`, if diffusers fails or loads nothing. The models are then unchanged.
        RefusedError: The same for a RuntimeError of diffusers, such as a size that does not match.
    """
    before = {component: _Whole.of(model) for component, model in models.items()}
    adapters = {component: set(getattr(model, "peft_config", {})) for component, model in models.items()}
    try:
        stock()
    except Exception as error:
        for component, whole in before.items():
            whole.restore(models[component])
        if isinstance(error, RuntimeError):
            raise RefusedError(f"{reason}; diffusers: {' '.join(str(error).split()):.200}") from error
        raise reason from error
    norms = any(getattr(model, "_transformer_norm_layers", None) for model in models.values())
    loaded = norms or any(set(getattr(models[name], "peft_config", {})) != had for name, had in adapters.items())
    if not loaded and any(_is_for_a_layer(key, tensor) for key, tensor in contents().items()):
        raise reason


def _is_for_a_layer(key: str, tensor: torch.Tensor) -> bool:
    """Whether a tensor is for an adapted layer: not a scalar without a module, and not the weight of a norm."""
    return not (("." not in key and tensor.ndim == 0) or ("norm" in key and "lora" not in key))


@dataclass(frozen=True)
class _Whole:
    """A snapshot of a model's adapters and layers, since diffusers replaces some layers by wider ones."""

    state: ModelState
    layers: Mapping[str, nn.Module]
    config: object

    @classmethod
    def of(cls, model: nn.Module) -> "_Whole":
        return cls(ModelState.of(model), dict(model.named_modules()), vars(model).get("_internal_dict"))

    def restore(self, model: nn.Module) -> None:
        self.state.restore(model)
        for path, layer in self.layers.items():
            if path and model.get_submodule(path) is not layer:
                parent, _, name = path.rpartition(".")
                setattr(model.get_submodule(parent), name, layer)
        if self.config is not None:
            vars(model)["_internal_dict"] = self.config


# --- whether everything has arrived --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Held:
    """A tensor in a layer; for the `down` of a pair also the scale and the rank."""

    values: torch.Tensor
    component: str
    path: str
    scale: float | None = None
    rank: int = 0


def _held(models: Mapping[str, nn.Module], adapter_name: str) -> Iterator[_Held]:
    """Every tensor of the adapter in the models."""
    for component, model in models.items():
        for path, layer in model.named_modules():
            if not isinstance(layer, LoraLayer):
                continue
            for name in HELD:
                parts = getattr(layer, name, {})
                if adapter_name not in parts:
                    continue
                part = parts[adapter_name]
                values = [part] if isinstance(part, torch.Tensor) else list(part.parameters())
                scale = float(layer.scaling[adapter_name]) if name in DOWN_HELD else None
                yield from (_Held(tensor.detach(), component, path, scale, layer.r[adapter_name]) for tensor in values)


def _numbers(tensor: torch.Tensor, dtype: torch.dtype) -> bytes:
    """The bytes of a tensor cast to a layer's dtype, regardless of its shape; b"" for a tensor on the meta device."""
    if tensor.device.type == "meta":  # the load did not set this weight
        return b""
    return tensor.detach().to("cpu", dtype).float().contiguous().flatten().numpy().tobytes()


def _lost(
    models: Mapping[str, nn.Module], adapter_name: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> str | None:
    """The first key whose tensor or scale is in no layer, or a layer whose weight is not in the file; else None."""
    here: dict[bytes, list[_Held]] = {}
    dtypes = set()
    for held in _held(models, adapter_name):
        here.setdefault(_numbers(held.values, held.values.dtype), []).append(held)
        dtypes.add(held.values.dtype)
    for key, tensor in tensors.items():
        if key.endswith(".alpha") or ("." not in key and tensor.ndim == 0):  # an alpha or a scalar without a module
            continue
        numbers = next((candidate for dtype in dtypes if (candidate := _numbers(tensor, dtype)) in here), None)
        if numbers is None:
            return key
        alike = here[numbers]
        fitting = next((held for held in alike if _scale_is_right(held, key, tensors, metadata)), None)
        if fitting is None:
            return f"the scale of {key}"
        alike.remove(fitting)
        if not alike:
            del here[numbers]
    left = next((held for alike in here.values() for held in alike), None)
    return None if left is None else f"{left.component}.{left.path}"


def _scale_is_right(held: _Held, key: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bool:
    """Whether the layer of a pair has the scale that follows from the file's alpha or metadata."""
    if held.scale is None or held.rank == 0:
        return True
    stem = key.partition(".lora")[0]
    if f"{stem}.alpha" in tensors:
        alpha = float(tensors[f"{stem}.alpha"])
    else:
        alpha = alpha_of(metadata, held.component, held.path, held.rank)
    return math.isclose(held.scale, alpha / held.rank, rel_tol=1e-4, abs_tol=1e-8)
