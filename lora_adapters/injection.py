"""Injects adapters into live models atomically, and removes them again."""

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from peft import LoraConfig, PeftConfig, PeftMixedModel, PeftModel, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from lora_adapters.convert.deltas.base import Delta, with_article, with_tensors
from lora_adapters.convert.deltas.full import Full
from lora_adapters.convert.deltas.low_rank import LowRank
from lora_adapters.convert.deltas.scaled_bias import scales_bias, with_base_bias
from lora_adapters.convert.errors import AdapterError, UnknownFormatError
from lora_adapters.convert.families.names import ModuleName, nearest, text_path
from lora_adapters.convert.storage.mapped_pages import MappedPages
from lora_adapters.types.layers import HELD, factors, layers, put, width
from lora_adapters.types.lycoris import operations
from lora_adapters.types.lycoris.config import TYPE as LYCORIS
from lora_adapters.types.lycoris.layer import hold
from lora_adapters.types.lycoris.operations import base_bias, norms, weight_shape
from lora_adapters.types.registry import beyond_deltas, beyond_lora, config_options, delta_of, refit

from .adapted_models import CHANGING
from .target_modules import RankAlpha
from .tuner import inject_at

D = TypeVar("D", bound=Delta)
PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)
_COMPUTED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # the dtypes of adapters


def unwrapped(model: Any) -> Any:
    """The model without the wrappers of torch.compile, PEFT and parallel training, which rename its modules."""
    while isinstance(model, nn.Module):
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, PARALLEL):
            model = model.module
        elif isinstance(model, PeftModel):
            model = model.get_base_model()
        elif isinstance(model, PeftMixedModel):
            model = model.base_model.model
        else:
            break
    return model


def live_path(model: nn.Module, path: str) -> str:
    """The path in this model: CLIPTextModel of transformers 5 has no `text_model.`."""
    return path if hasattr(model, "text_model") else path.removeprefix("text_model.")


def _base_layer(model: Any, path: str) -> nn.Module | None:
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return None
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def match_to_model(
    model: nn.Module, component: str, modules: Mapping[str, D], missing: list[str] | None = None
) -> dict[str, D]:
    """Match the changes of an adapter to the layers of a model, which is not changed.

    Args:
        model: The model.
        component: Its name in a pipeline, for error messages.
        modules: The changes by the path in files.
        missing: A list to which the names of modules that the model lacks are added; if None, they are an error.

    Returns:
        The changes by the path in this model; pairs have the number of dimensions of its layers.

    Raises:
        AdapterError: A module is missing, or a shape differs; the message names the module and the expected shape.
        UnknownFormatError: This package cannot change a layer of this type.
    """
    matched = {}
    for path, change in modules.items():
        live = live_path(model, path)
        layer = _base_layer(model, live)
        if layer is None and missing is not None:
            missing.append(f"{component}.{live}")
            continue
        if layer is None:
            known = (name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d)))
            raise AdapterError(f"the model has no module {component}.{live:.120}{nearest(live, known)}")
        _check_layer(layer, f"{component}.{live:.120}", change)
        try:
            matched[live] = _shaped_like(change, layer)
        except AdapterError as error:
            raise AdapterError(f"{component}.{path} is {error}") from None
    return matched


def _check_layer(layer: nn.Module, name: str, change: Delta) -> None:
    """Raise AdapterError or UnknownFormatError if a change of this kind is not possible in a layer of this type."""
    if not isinstance(layer, operations.layers()):
        kinds = "no linear layer or 2D convolution" + ("" if isinstance(change, LowRank) else ", and no norm")
        raise UnknownFormatError(f"{name} is a {type(layer).__name__}, {kinds}")
    if isinstance(layer, norms()) and not isinstance(change, Full):
        raise AdapterError(
            f"{name} is a {type(layer).__name__}, which cannot be changed by {with_article(change.kind)}"
        )
    if getattr(layer, "bias", None) is None and change.bias() is not None:
        raise UnknownFormatError(f"{name} has no bias, which the adapter changes")  # PEFT can add a bias
    if getattr(layer, "weight", None) is None:
        raise AdapterError(f"{name} is a {type(layer).__name__} without a weight, which the adapter changes")


def _shaped_like(change: Any, layer: Any) -> Any:
    """The change in the shape of the layer; AdapterError if it does not fit."""
    shape = weight_shape(layer)
    if isinstance(change, LowRank):
        return change.shaped_like(shape)
    if not change.fits(shape):
        raise AdapterError(f"{change!r}, but the model's weight is {list(shape)}")
    return with_base_bias(change, base_bias(layer)) if scales_bias(change) and layer.bias is not None else change


def _dtype(model: nn.Module) -> torch.dtype:
    dtype = getattr(model, "dtype", torch.float32)
    return dtype if dtype in _COMPUTED else torch.float32


def _dtype_in(base: nn.Module, of_model: torch.dtype) -> torch.dtype:
    """The dtype of an adapter in a layer: the layer's own, which can be float32 for its range (T5's `wo`).

    For a layer whose storage dtype differs from its compute dtype (quantised, or cast by diffusers), it is the compute
    dtype, if known.
    """
    hooks: Any = getattr(base, "_diffusers_hook", None)
    casting = None if hooks is None else hooks.get_hook("layerwise_casting")
    dtype = base.weight.dtype if casting is None else casting.compute_dtype
    return dtype if isinstance(dtype, torch.dtype) and dtype in _COMPUTED else of_model


def place(
    model: nn.Module,
    matched: Mapping[str, Delta],
    adapter_name: str,
    facts: Mapping[str, Any],
    low_cpu_mem_usage: bool = True,
    pages: MappedPages | None = None,
) -> None:
    """Add changes to a model as a new adapter, in the dtypes and on the devices of its layers.

    Args:
        model: The model.
        matched: The changes, as `match_to_model` returns them.
        adapter_name: The adapter's name, which must be unused in the model.
        facts: The adapter's type and the fields of the type, as returned by `types.registry.facts_of_metadata`; used
            if all changes are low-rank pairs.
        low_cpu_mem_usage: Create the layers without memory for initial weights, and keep full differences memory-mapped
            from their file if they do not take more memory than in the model's dtype.
        pages: The mapped pages that contain the changes, which are released as they are copied; None keeps them.

    Raises:
        AdapterError: A change has no layer in the model.
    """
    with CHANGING:
        _place(model, matched, adapter_name, facts, low_cpu_mem_usage, pages or MappedPages())


def _place(
    model: nn.Module,
    matched: Mapping[str, Delta],
    adapter_name: str,
    facts: Mapping[str, Any],
    low_cpu_mem_usage: bool,
    pages: MappedPages,
) -> None:
    of_model, nothing = _dtype(model), torch.empty(0)
    ranks = {path: change if isinstance(change, LowRank) else RankAlpha(1, 1.0) for path, change in matched.items()}
    if any(not isinstance(change, LowRank) for change in matched.values()):
        facts = {"type": LYCORIS.name}
    config = LoraConfig(**config_options(ranks, facts))
    if not inject_at(model, config, adapter_name, matched):
        names = {f"{path}.lora_A.weight": nothing for path in matched}  # PEFT only uses the paths
        inject_adapter_in_model(
            config, model, adapter_name=adapter_name, state_dict=names, low_cpu_mem_usage=low_cpu_mem_usage
        )
    left = dict(matched)
    for path, layer in layers(model, adapter_name):
        base, change = layer.get_base_layer(), left.pop(path)
        device, dtype = base.weight.device, _dtype_in(base, of_model)
        device = torch.device("cpu") if device.type == "meta" else device
        if isinstance(change, LowRank):
            put(layer, adapter_name, change, device, dtype)
            pages.use(change.down.nbytes + change.up.nbytes)
        else:
            hold(layer, adapter_name, _as_live(change, device, dtype, pages, low_cpu_mem_usage), dtype)
    if left:
        raise AdapterError(f"{next(iter(left))} could not be injected into the model")
    refit(model)  # otherwise a DyLoRA would adjust to the width of its factors at the first call, and compile twice
    model._hf_peft_config_loaded = True  # type: ignore[assignment]  # checked by diffusers and transformers


def _as_live(change: Delta, device: torch.device, dtype: torch.dtype, pages: MappedPages, mapped: bool) -> Delta:
    """A copy of the change in the model's dtype, so that the model does not depend on a memory-mapped file.

    Values for whole channels, such as DoRA's magnitudes, keep their precision, since they scale the weight itself. With
    `mapped`, full differences stay memory-mapped if they need no other device and do not take more memory than in the
    model's dtype: they are as large as the model, whose weights transformers and diffusers also keep mapped.
    """

    def copied(name: str, tensor: torch.Tensor) -> torch.Tensor:
        precise = tensor.numel() == max(tensor.shape, default=1)
        wanted = torch.promote_types(dtype, torch.float32) if precise else dtype
        narrow = tensor.element_size() <= dtype.itemsize and not precise
        ready = tensor.device == device and tensor.is_contiguous() and (tensor.dtype == wanted or narrow)
        if mapped and ready and name.endswith("diff") and pages.holds(tensor):
            return tensor
        copy = tensor.to(device, wanted, copy=True).contiguous()
        pages.use(tensor.nbytes)
        return copy

    return with_tensors(change, copied)


def freeze(model: Any, adapter_name: str) -> None:
    """Disable the training of an adapter and the model's dropouts, as transformers' `load_adapter` does."""
    model.eval()
    model.peft_config[adapter_name].inference_mode = True
    for _, layer in layers(model, adapter_name):
        for factor in factors(layer, adapter_name):
            factor.requires_grad_(False)


def add_adapter(model: nn.Module, config: PeftConfig, adapter_name: str = "default") -> None:
    """Add a new adapter to a model and activate it, like `add_adapter` of diffusers' models.

    The `add_adapter` of transformers' text encoders does the same, but since transformers 5.24 it requires PEFT 0.22,
    although older versions of PEFT could do it too.

    Args:
        model: A U-Net, text encoder or any other model, trainable or not.
        config: The adapter's config, from this package or from PEFT.
        adapter_name: The name of the new adapter.

    Raises:
        AdapterError: The model already has an adapter of that name, or has no module that matches the config.
    """
    if adapter_name in getattr(model, "peft_config", {}):
        raise AdapterError(f"the model already has an adapter {adapter_name}: choose another name")
    inject_adapter_in_model(config, model, adapter_name)
    model._hf_peft_config_loaded = True  # type: ignore[assignment]
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.set_adapter(adapter_name)


def take_out(model: nn.Module, adapter_name: str) -> None:
    """Remove an adapter from the model's layers, and PEFT's layer too if it has no other adapter."""
    for path, layer in list(model.named_modules()):
        if not isinstance(layer, LoraLayer) or not any(adapter_name in getattr(layer, held, ()) for held in HELD):
            continue
        layer.delete_adapter(adapter_name)
        layer.lora_variant.pop(adapter_name, None)
        if not any(len(getattr(layer, held, ())) for held in HELD):
            unwrap(model, path, layer)


def unwrap(model: nn.Module, path: str, layer: LoraLayer) -> None:
    """Replace PEFT's layer at a path by the layer that it wraps."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, layer.base_layer)


def active(model: nn.Module) -> list[str]:
    """The names of the active adapters."""
    return next((list(part.active_adapters) for part in model.modules() if isinstance(part, BaseTunerLayer)), [])


def is_plain(model: nn.Module, adapter_name: str) -> bool:
    """Whether the adapter consists only of low-rank pairs."""
    return all(beyond_lora(layer, adapter_name) is None for _, layer in layers(model, adapter_name))


def extract_changes(model: Any, component: str, adapter_name: str) -> dict[ModuleName, Delta]:
    """The changes of an adapter in a model, as views of the live weights.

    Args:
        model: The model, without wrappers (see `unwrapped`).
        component: Its name in a pipeline.
        adapter_name: The adapter's name in it.

    Returns:
        The changes by the module name in files.

    Raises:
        AdapterError: The adapter uses a PEFT feature that is not supported (see `types.registry.beyond_deltas`).
    """
    stabilized = bool(getattr(model.peft_config[adapter_name], "use_rslora", False))
    changes = {}
    for path, layer in layers(model, adapter_name):
        if more := beyond_deltas(layer, adapter_name):
            raise AdapterError(f"adapter {adapter_name} is not a plain LoRA: {component}.{path} has {more}")
        changes[module_named(component, path)] = delta_of(layer, adapter_name, stabilized)
    return changes


def widths(model: Any, component: str, adapter_name: str) -> dict[ModuleName, int]:
    """The allocated rank of each module of the adapter, which is above its rank if the module is padded."""
    return {module_named(component, path): width(layer, adapter_name) for path, layer in layers(model, adapter_name)}


def module_named(component: str, path: str) -> ModuleName:
    """The name in files of the module at a path of a model."""
    return ModuleName(component, text_path(path) if is_text_encoder(component) else path)


def is_text_encoder(component: str) -> bool:
    """Whether a component is a text encoder: "text_encoder", "text_encoder_2", ..."""
    return component.startswith("text_encoder")
