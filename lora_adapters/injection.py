"""Putting low-rank pairs into a live model, all or nothing, and taking them out again."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from peft import LoraConfig, PeftMixedModel, PeftModel, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from lora_adapters.convert.deltas.low_rank import LowRank
from lora_adapters.convert.errors import AdapterError, UnknownFormatError
from lora_adapters.convert.families.names import ModuleName, nearest, text_path
from lora_adapters.convert.formats.diffusers import lora_config
from lora_adapters.convert.formats.metadata import DyLora
from lora_adapters.types.config import FACTS, DyLoraConfig, LierLaConfig
from lora_adapters.types.dylora.rank_control import DyLoraVariant, layers

from .target_modules import RankAlpha

# What a layer of PEFT's keeps of its adapters, by their names.
HELD = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")


def unwrapped(model: Any) -> Any:
    """The model inside of torch.compile's and PEFT's wrappers, which name everything in it anew."""
    while isinstance(model, nn.Module):
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, PeftModel):
            model = model.get_base_model()
        elif isinstance(model, PeftMixedModel):
            model = model.base_model.model
        else:
            break
    return model


def live_path(model: nn.Module, path: str) -> str:
    """The path as this model has it: transformers 5's CLIPTextModel has no `text_model.` level."""
    return path if hasattr(model, "text_model") else path.removeprefix("text_model.")


def _base_layer(model: Any, path: str) -> nn.Module | None:
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return None
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _weight_shape(layer: nn.Module) -> tuple[int, ...]:
    """(out, in) or (out, in, height, width), also of quantised layers, whose weights are packed."""
    if isinstance(layer, nn.Conv2d):
        return tuple(layer.weight.shape)
    return (layer.out_features, layer.in_features)  # type: ignore[return-value]


def fitted(
    model: nn.Module, component: str, modules: Mapping[str, LowRank], missing: list[str] | None = None
) -> dict[str, LowRank]:
    """The pairs by this model's own paths, in its own spelling of 1x1; nothing is changed in the model.

    missing: where the names of modules that the model lacks are added; None makes the first of them an AdapterError.
    AdapterError too, which names the module and what was expected, where a shape differs; UnknownFormatError where the
    layer is of a type that no low-rank pair of this package is for.
    """
    placed = {}
    for path, one in modules.items():
        live = live_path(model, path)
        layer = _base_layer(model, live)
        if layer is None and missing is not None:
            missing.append(f"{component}.{live}")
            continue
        if layer is None:
            known = (name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d)))
            raise AdapterError(f"the model has no module {component}.{live:.120}{nearest(live, known)}")
        if not isinstance(layer, (nn.Linear, nn.Conv2d)):
            raise UnknownFormatError(
                f"{component}.{live:.120} is a {type(layer).__name__}, no linear layer or 2D convolution"
            )
        try:
            placed[live] = one.shaped_like(_weight_shape(layer))
        except AdapterError as error:
            raise AdapterError(f"{component}.{path} is {error}") from None
    return placed


def plain_config(modules: Mapping[str, LowRank | RankAlpha], dylora: DyLora | None) -> dict[str, Any]:
    """Keyword arguments of the LoraConfig that gives each module its own rank and alpha, and its type back."""
    table = lora_config(modules)
    if dylora is None:
        facts: dict[str, Any] = {"type": "LierLa"}
    else:
        unit, highest = dylora.unit, max(one.rank for one in modules.values())
        facts = {"type": "DyLora", **asdict(dylora), "unit": unit if highest % unit == 0 else 1}
        table["r"] = table["r"] if table["r"] % facts["unit"] == 0 else highest
        table = {**lora_config(modules, rank=table["r"])}
    return {**table, "auto_mapping": {FACTS: {**facts, "resolved": True}}}


def _dtype(model: nn.Module) -> torch.dtype:
    dtype = getattr(model, "dtype", torch.float32)
    return dtype if dtype in (torch.float16, torch.bfloat16, torch.float32) else torch.float32


def place(
    model: nn.Module,
    placed: Mapping[str, LowRank],
    adapter_name: str,
    dylora: DyLora | None = None,
    low_cpu_mem_usage: bool = True,
) -> None:
    """Add the fitted pairs (see `fitted`) to the model as an adapter, in the model's dtype and on its device."""
    config, dtype = LoraConfig(**plain_config(placed, dylora)), _dtype(model)
    names = {f"{path}.lora_A.weight": one.down for path, one in placed.items()}  # of which PEFT takes the paths only
    inject_adapter_in_model(
        config, model, adapter_name=adapter_name, state_dict=names, low_cpu_mem_usage=low_cpu_mem_usage
    )
    left = dict(placed)
    for path, layer in layers(model, adapter_name):
        one, device = left.pop(path), layer.get_base_layer().weight.device
        up = one.up if one.alpha else torch.zeros_like(one.up)
        for part, values in ((layer.lora_A[adapter_name], one.down), (layer.lora_B[adapter_name], up)):
            # A copy, so that the model does not hang on a memory-mapped file.
            values = values.to("cpu" if device.type == "meta" else device, dtype, copy=True).contiguous()
            part.weight = nn.Parameter(values, part.weight.requires_grad)
    if left:
        raise AdapterError(f"{next(iter(left))} found no place in the model")
    model._hf_peft_config_loaded = True  # type: ignore[assignment]  # what diffusers and transformers ask for


def take_out(model: nn.Module, adapter_name: str) -> None:
    """Take an adapter out of the model's layers and, where it was the only one of a layer, PEFT's layer with it."""
    for path, layer in list(model.named_modules()):
        if not isinstance(layer, LoraLayer) or not any(adapter_name in getattr(layer, held, ()) for held in HELD):
            continue
        layer.delete_adapter(adapter_name)
        layer.lora_variant.pop(adapter_name, None)
        if not any(len(getattr(layer, held, ())) for held in HELD):
            unwrap(model, path, layer)


def unwrap(model: nn.Module, path: str, layer: LoraLayer) -> None:
    """Put the layer that PEFT's layer at the path wraps back in its place."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, layer.base_layer)


def active(model: nn.Module) -> list[str]:
    """The names of the active adapters."""
    return next((list(part.active_adapters) for part in model.modules() if isinstance(part, BaseTunerLayer)), [])


def beyond_lora(layer: Any, adapter_name: str) -> str | None:
    """What the adapter does in the layer that no low-rank pair can hold; None where it is plain LoRA or DyLoRA."""
    if adapter_name in layer.lora_magnitude_vector:
        return "DoRA's magnitudes"
    if getattr(layer.lora_B[adapter_name], "bias", None) is not None:
        return "biases (lora_bias)"
    variant = layer.lora_variant.get(adapter_name)
    return None if variant is None or isinstance(variant, DyLoraVariant) else type(variant).__name__


def is_plain(model: nn.Module, adapter_name: str) -> bool:
    """Whether pairs are all that the adapter is made of."""
    return all(beyond_lora(layer, adapter_name) is None for _, layer in layers(model, adapter_name))


def taken(model: Any, component: str, adapter_name: str) -> dict[ModuleName, LowRank]:
    """The pairs of an adapter in the model, by the paths that files have; views of the live weights.

    AdapterError where it is more than pairs (see `beyond_lora`).
    """
    config = model.peft_config[adapter_name]
    found = {}
    for path, layer in layers(model, adapter_name):
        if more := beyond_lora(layer, adapter_name):
            raise AdapterError(f"adapter {adapter_name} is more than plain LoRA: {component}.{path} has {more}")
        down, up = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
        rank, alpha = layer.r[adapter_name], float(layer.lora_alpha[adapter_name])
        if getattr(config, "use_rslora", False):
            alpha *= rank**0.5
        # An adapter that is prepared to be swapped is padded with zeros; one that PEFT has combined may be narrower
        # than the rank that its alpha belongs to.
        held = min(rank, down.shape[0])
        alpha *= held / rank
        found[_named(component, path)] = LowRank(down.detach()[:held], up.detach()[:, :held], alpha)
    return found


def widths(model: Any, component: str, adapter_name: str) -> dict[ModuleName, int]:
    """How many components each module of the adapter has room for; more than its rank where it is padded."""
    found = layers(model, adapter_name)
    return {_named(component, path): layer.lora_A[adapter_name].weight.shape[0] for path, layer in found}


def _named(component: str, path: str) -> ModuleName:
    return ModuleName(component, path if component == "unet" else text_path(path))


def dylora_in(model: Any, adapter_name: str) -> DyLora | None:
    """The DyLoRA facts of an adapter in the model, or None."""
    config: Any = getattr(model, "peft_config", {}).get(adapter_name)
    return config.dylora if isinstance(config, DyLoraConfig) else None


def is_ours(model: nn.Module, adapter_name: str) -> bool:
    """Whether the adapter has one of this package's configs."""
    return isinstance(getattr(model, "peft_config", {}).get(adapter_name), LierLaConfig)
