"""Loads adapters in `load_lora_adapter` of diffusers' models, and when pipelines load into one of their models.

There, diffusers reads low-rank pairs under its own names, and LoKr of linear layers without alphas. This module reads
other types (LoHa, DoRA with `dora_scale`, full differences, ...), LoKr, and kohya's names.
"""

from collections.abc import Callable, Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from lora_adapters.convert.adapter import Adapter
from lora_adapters.convert.errors import AdapterError, UnknownFormatError, UnknownModuleError
from lora_adapters.convert.families.family import ModelFamily
from lora_adapters.convert.families.kohya_names import PREFIXES
from lora_adapters.convert.families.names import COMPONENTS
from lora_adapters.convert.families.registry import DENOISER, by_class
from lora_adapters.convert.formats.kinds import kind_of
from lora_adapters.convert.storage.files import read_tensors
from lora_adapters.convert.storage.sources import locate

from .adapted_models import CHANGING
from .live_names import LiveNames
from .pipeline import HUB_OPTIONS, load_adapter

Tensors = Mapping[str, torch.Tensor]


def loading(stock: Callable[..., None]) -> Callable[..., None]:
    """Wraps `load_lora_adapter` of models: this package reads the types of adapters that diffusers cannot read."""

    def load_lora_adapter(
        self: Any,
        pretrained_model_name_or_path_or_dict: Any,
        prefix: str | None = "transformer",
        *args: Any,
        **kwargs: Any,
    ) -> None:
        source = pretrained_model_name_or_path_or_dict

        def own() -> None:
            with CHANGING:
                stock(self, source, prefix, *args, **kwargs)

        tensors = None if args or kwargs.get("hotswap") else _contents(source, kwargs)
        if tensors is None or not _is_read_here(tensors):
            own()
            return
        family = by_class(self)
        component = DENOISER if family is None else family.denoiser.name
        chosen = _of_model(tensors, prefix, component, kwargs.get("network_alphas"))
        try:
            _load(self, component, chosen, family, kwargs)
        except (UnknownModuleError, UnknownFormatError):
            if not any(".lokr_" in key for key in tensors):
                raise
            own()  # diffusers cannot load it into this model

    return load_lora_adapter


def loading_text(stock: Callable[..., None]) -> Callable[..., None]:
    """Wraps diffusers' `_load_lora_into_text_encoder`; see `loading`."""

    def load_lora_into_text_encoder(
        state_dict: Tensors,
        network_alphas: Mapping[str, float] | None,
        text_encoder: nn.Module,
        prefix: str | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        component = prefix or kwargs.get("text_encoder_name") or "text_encoder"
        if args or kwargs.get("hotswap") or component not in COMPONENTS or not _is_read_here(state_dict):
            with CHANGING:
                stock(state_dict, network_alphas, text_encoder, prefix, *args, **kwargs)
            return
        chosen = _of_model(state_dict, component, component, network_alphas)
        _load(text_encoder, component, chosen, None, kwargs)

    return load_lora_into_text_encoder


def _contents(source: Any, options: Mapping[str, Any]) -> Tensors | None:
    """The tensors of a state dict, file, folder or repository; None if loading is left to diffusers."""
    if isinstance(source, Mapping):
        return source
    hub = {key: options[key] for key in HUB_OPTIONS if options.get(key) is not None}
    try:
        path = locate(source, weight_name=options.get("weight_name"), subfolder=options.get("subfolder"), **hub)
        return None if path.is_dir() else read_tensors(path)[0]
    except AdapterError:
        return None


def _is_read_here(keys: Iterable[str]) -> bool:
    """Whether the keys are of a kind, or have names, that diffusers cannot read."""
    found = kind_of(keys)
    if found is not None:
        return found[0].is_read and not found[0].diffusers
    return any(key.startswith(tuple(PREFIXES)) for key in keys)


def _of_model(
    tensors: Tensors, prefix: str | None, component: str, alphas: Mapping[str, float] | None
) -> dict[str, torch.Tensor]:
    """The tensors with the component added to their names: those with the prefix, or all if no key has it."""
    given = {**tensors, **{key: torch.as_tensor(alpha) for key, alpha in (alphas or {}).items()}}
    start = f"{prefix}."
    behind = {key.removeprefix(start): tensor for key, tensor in given.items() if prefix and key.startswith(start)}
    if behind:
        return {f"{component}.{key}": tensor for key, tensor in behind.items()}
    return given


def _load(
    model: nn.Module,
    component: str,
    tensors: Tensors,
    family: ModelFamily | None,
    options: Mapping[str, Any],
) -> None:
    """Load the tensors of the component into the model, atomically.

    Raises:
        AdapterError: The tensors cannot be read, are for another model, or none is for this component.
    """
    adapter = Adapter.from_tensors(tensors, None, LiveNames({component: model}), family=family)
    mine = {module: change for module, change in adapter.modules.items() if module.component == component}
    if not mine:
        raise AdapterError(f"the state dict has no weights for the {component}")
    pipe = options.get("_pipeline")
    offloading = getattr(pipe, "_optionally_disable_offloading", lambda _: (False, False, False))
    alone = SimpleNamespace(
        **{component: model},
        _lora_loadable_modules=[component],
        _optionally_disable_offloading=lambda _: offloading(pipe),
        enable_model_cpu_offload=getattr(pipe, "enable_model_cpu_offload", None),
        enable_sequential_cpu_offload=getattr(pipe, "enable_sequential_cpu_offload", None),
    )
    load_adapter(alone, Adapter(mine, adapter.metadata), options.get("adapter_name"))
