"""What happens in `pipe.load_lora_weights`."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from lora_adapters.convert.errors import AdapterError, UnknownFormatError
from lora_adapters.convert.low_rank import LowRank

from . import placing, swapping
from .adapter import Adapter

logger = logging.getLogger(__name__)
_HUB = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision")


def load(
    pipe: Any,
    source: Any,
    *,
    adapter_name: str | None = None,
    hotswap: bool = False,
    low_cpu_mem_usage: bool = True,
    weight_name: str | None = None,
    subfolder: str | None = None,
    **kwargs: Any,
) -> bool:
    """Load an adapter into the pipeline; False where the source is in a format that this package leaves to diffusers.

    source: a state dict, a file, a folder, a Hub repository, or an Adapter. AdapterError, which names the source, where
    it cannot be loaded; the pipeline is then as it was before.
    """
    adapter, name = source, "the adapter"
    if not isinstance(source, Adapter):
        try:
            if isinstance(source, Mapping):
                name = "the state dict"
                adapter = Adapter.from_tensors(dict(source))
            else:
                hub = {key: kwargs[key] for key in _HUB if kwargs.get(key) is not None}
                name = str(Path(source) / (subfolder or "") / (weight_name or ""))
                adapter = Adapter.load(source, weight_name=weight_name, subfolder=subfolder, **hub)
        except UnknownFormatError:
            return False
    try:
        _load(pipe, adapter, adapter_name, hotswap, low_cpu_mem_usage)
    except AdapterError as error:
        raise AdapterError(f"{name}: {error}") from None
    return True


def default_name(pipe: Any) -> str:
    """`default_<n>`, the name that diffusers gives to its n-th adapter, free in every component."""
    used = {name for part in _models(pipe).values() for name in getattr(part, "peft_config", {})}
    return next(name for name in (f"default_{n}" for n in range(len(used) + 1)) if name not in used)


def _models(pipe: Any) -> dict[str, nn.Module]:
    loadable = getattr(pipe, "_lora_loadable_modules", ("unet", "text_encoder", "text_encoder_2"))
    parts = {name: getattr(pipe, name, None) for name in loadable}
    return {name: placing.unwrapped(part) for name, part in parts.items() if isinstance(part, nn.Module)}


def _by_component(pipe: Any, adapter: Adapter) -> dict[str, dict[str, LowRank]]:
    """The adapter's pairs for each component that the pipeline has, fitted to it."""
    models = _models(pipe)
    modules: dict[str, dict[str, LowRank]] = {}
    for module, one in adapter.modules.items():
        modules.setdefault(module.component, {})[module.path] = one
    for component in [name for name in modules if name not in models]:
        if not hasattr(pipe, component):
            raise AdapterError(f"it adapts {component}, which a {type(pipe).__name__} does not have")
        logger.warning("The pipeline runs without its %s: the adapter's part for it is left out.", component)
        del modules[component]
    if not modules:
        raise AdapterError("it adapts nothing that the pipeline has")
    return {component: placing.fitted(models[component], component, found) for component, found in modules.items()}


def _load(pipe: Any, adapter: Adapter, adapter_name: str | None, hotswap: bool, low_cpu_mem_usage: bool) -> None:
    fitted = _by_component(pipe, adapter)
    models = _models(pipe)
    adapter_name = adapter_name or default_name(pipe)
    present = [component for component in fitted if adapter_name in getattr(models[component], "peft_config", {})]
    if hotswap:
        swapped = _everywhere(models, fitted, adapter_name)
        for component, modules in {**fitted, **swapped}.items():
            swapping.check(models[component], component, modules, adapter_name)
        for component, modules in swapped.items():
            swapping.swap(models[component], modules, adapter_name, adapter.dylora)
        return
    if present:
        raise AdapterError(f"the name {adapter_name} is in use in {', '.join(present)}: choose another adapter_name")
    before = {component: _active(models[component]) for component in fitted}
    offloaded = pipe._optionally_disable_offloading(pipe)
    try:
        for component, modules in fitted.items():
            placing.place(models[component], modules, adapter_name, adapter.dylora, low_cpu_mem_usage)
            swapping.prepare(models[component], adapter_name)
    except BaseException:
        for component in fitted:
            placing.remove(models[component], adapter_name)
            _activate(models[component], before[component])
        raise
    finally:
        _offload_again(pipe, *offloaded)


def _everywhere(
    models: Mapping[str, nn.Module], fitted: Mapping[str, dict[str, LowRank]], adapter_name: str
) -> dict[str, dict[str, LowRank]]:
    """The pairs for every component that has the adapter: none for one that the new adapter leaves alone."""
    here = [component for component, model in models.items() if adapter_name in getattr(model, "peft_config", {})]
    return {component: dict(fitted.get(component, {})) for component in here}


def _active(model: nn.Module) -> list[str]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return next((list(part.active_adapters) for part in model.modules() if isinstance(part, BaseTunerLayer)), [])


def _activate(model: nn.Module, names: list[str]) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for part in model.modules():
        if isinstance(part, BaseTunerLayer):
            part.set_adapter(names)


def _offload_again(pipe: Any, model_offload: bool, sequential_offload: bool, group_offload: bool) -> None:
    if model_offload:
        pipe.enable_model_cpu_offload(device=getattr(pipe, "_offload_device", None))
    elif sequential_offload:
        pipe.enable_sequential_cpu_offload(device=getattr(pipe, "_offload_device", None))
    elif group_offload:
        from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading

        for part in _models(pipe).values():
            _maybe_remove_and_reapply_group_offloading(part)
