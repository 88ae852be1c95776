"""Handing a load back to diffusers, for adapters that PEFT's layers can hold and this package's pairs cannot.

DoRA, biases, convolutions in one or three dimensions, layers of other types. Diffusers leaves out what it does not know
with a line in the log, or without one. So what it has loaded is compared with the file: where a tensor or a scale of it
is not in the layers, everything is undone, and the load is an error.
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
    """Neither this package nor diffusers can load it; also a RuntimeError, as diffusers and torch raise."""


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
        adapter_name: The name that `stock` uses, which is free in the models.
        tensors: The tensors of the file.
        metadata: The metadata of the file.
        reason: Why this package does not read the file.

    Raises:
        AdapterError: `reason`, if diffusers fails or does not load every tensor with its scale. The models are then as
            before.
    """
    before = {component: ModelState.of(model) for component, model in models.items()}
    try:
        try:
            stock()
        except Exception as error:
            raise reason from error
        lost = _lost(models, adapter_name, tensors, metadata)
        if lost is not None:
            raise AdapterError(f"{reason}; diffusers leaves out or changes {lost:.100}")
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
    """Let diffusers load what it can, for a transformer whose files it converts itself. What it loaded is not checked.

    Args:
        models: The models of the pipeline by component.
        stock: Loads the adapter into the models.
        reason: Why this package does not read the file.
        contents: Returns the tensors of the file. If none of them is for a layer, it is no error that nothing was
            loaded.

    Raises:
        AdapterError: `reason`, if diffusers fails or loads nothing. The models are then as before.
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
    """Whether a tensor is more than a number that is no module's, or a weight of a norm, which diffusers looks for."""
    return not (("." not in key and tensor.ndim == 0) or ("norm" in key and "lora" not in key))


@dataclass(frozen=True)
class _Whole:
    """A model's adapters and its layers: diffusers exchanges some layers for wider ones."""

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
    """A tensor in a layer, and the layer's scale and rank where it is the `down` of a pair."""

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
    """The numbers in a tensor as they are in a layer of that dtype, whatever its shape; none if it has no memory."""
    if tensor.device.type == "meta":  # what the load left as it was injected
        return b""
    return tensor.detach().to("cpu", dtype).float().contiguous().flatten().numpy().tobytes()


def _lost(
    models: Mapping[str, nn.Module], adapter_name: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> str | None:
    """The first key whose tensor or scale no layer has, or a layer whose numbers no key has; None if all match."""
    here: dict[bytes, list[_Held]] = {}
    dtypes = set()
    for held in _held(models, adapter_name):
        here.setdefault(_numbers(held.values, held.values.dtype), []).append(held)
        dtypes.add(held.values.dtype)
    for key, tensor in tensors.items():
        if key.endswith(".alpha") or ("." not in key and tensor.ndim == 0):  # a number that is no module's
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
    """Whether the layer of a pair has the scale that the file's alpha, or its metadata, tells."""
    if held.scale is None or held.rank == 0:
        return True
    stem = key.partition(".lora")[0]
    if f"{stem}.alpha" in tensors:
        alpha = float(tensors[f"{stem}.alpha"])
    else:
        alpha = alpha_of(metadata, held.component, held.path, held.rank)
    return math.isclose(held.scale, alpha / held.rank, rel_tol=1e-4, abs_tol=1e-8)
