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
    """Neither this package nor diffusers can load it; of the type, too, that diffusers and torch raise themselves."""


def load(
    models: Mapping[str, nn.Module],
    stock: Callable[[], None],
    adapter_name: str,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str],
    reason: AdapterError,
) -> None:
    """Let diffusers load an adapter, whole or not at all.

    stock: what loads it under the name, which is free, into the models (by component). reason: why this package does
    not read it, the error where diffusers does not load it whole either; everything is then as it was before.
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
    """Let diffusers load what it can for a transformer whose files it converts itself: it is asked no more than that.

    stock: what loads it into the models (by component). reason: why this package does not read it, the error where
    diffusers does not load it either, or nothing of it; everything is then as it was before. contents: the tensors of
    the source. Where there is no layer's among them, diffusers' answer to that stands, which is a line in the log.
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
                part = getattr(layer, name, {})
                if adapter_name not in part:
                    continue
                one = part[adapter_name]
                values = [one] if isinstance(one, torch.Tensor) else list(one.parameters())
                scale = float(layer.scaling[adapter_name]) if name in DOWN_HELD else None
                yield from (_Held(tensor.detach(), component, path, scale, layer.r[adapter_name]) for tensor in values)


def _numbers(tensor: torch.Tensor, dtype: torch.dtype) -> bytes:
    """The numbers in a tensor as they are in a layer of that dtype, whatever its shape; none where it has no memory."""
    if tensor.device.type == "meta":  # what the load left as it was injected
        return b""
    return tensor.detach().to("cpu", dtype).float().contiguous().flatten().numpy().tobytes()


def _lost(
    models: Mapping[str, nn.Module], adapter_name: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> str | None:
    """The first key whose tensor or scale no layer has, or a layer whose numbers no key has; None where all match."""
    here: dict[bytes, list[_Held]] = {}
    dtypes = set()
    for one in _held(models, adapter_name):
        here.setdefault(_numbers(one.values, one.values.dtype), []).append(one)
        dtypes.add(one.values.dtype)
    for key, tensor in tensors.items():
        if key.endswith(".alpha") or ("." not in key and tensor.ndim == 0):  # a number that is no module's
            continue
        found = next((numbers for dtype in dtypes if (numbers := _numbers(tensor, dtype)) in here), None)
        if found is None:
            return key
        alike = here[found]
        fitting = next((one for one in alike if _scale_is_right(one, key, tensors, metadata)), None)
        if fitting is None:
            return f"the scale of {key}"
        alike.remove(fitting)
        if not alike:
            del here[found]
    left = next((one for alike in here.values() for one in alike), None)
    return None if left is None else f"{left.component}.{left.path}"


def _scale_is_right(one: _Held, key: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bool:
    """Whether the layer of a pair has the scale that the file's alpha, or its metadata, tells."""
    if one.scale is None or one.rank == 0:
        return True
    stem = key.partition(".lora")[0]
    if f"{stem}.alpha" in tensors:
        alpha = float(tensors[f"{stem}.alpha"])
    else:
        alpha = alpha_of(metadata, one.component, one.path, one.rank)
    return math.isclose(one.scale, alpha / one.rank, rel_tol=1e-4, abs_tol=1e-8)
