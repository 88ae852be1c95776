"""Wrappers of PEFT's LoRA and mixed tuners, in which this package's configs decide rank and alpha of every module."""

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from lora_adapters.convert.errors import AdapterError
from lora_adapters.convert.families.registry import by_class
from lora_adapters.convert.formats.diffusers import lora_config as patterns_of

# Imported as modules: each may be only partly loaded, if its import of peft loads this one.
from lora_adapters.types import base, layers, registry

from . import adapted_models, grafting
from .target_modules import RankAlpha, RankRule, base_layers

Method = Callable[..., Any]
Rule = Callable[[str, Any], RankAlpha]
_PEFT_MODEL_PREFIX = "base_model.model."  # PeftModel.add_adapter injects into itself, under this name


class _Resolved:
    """Rank and alpha from the anchored patterns of a config that was used in a model before: a dictionary lookup."""

    def __init__(self, config: LoraConfig):
        self.default = RankAlpha(config.r, config.lora_alpha)
        self.ranks, self.alphas = _literal(config.rank_pattern), _literal(config.alpha_pattern)

    def __call__(self, path: str, layer: nn.Module) -> RankAlpha:
        path = path.removeprefix("text_model.")
        return RankAlpha(self.ranks.get(path, self.default.rank), self.alphas.get(path, self.default.alpha))


def _literal(pattern: Mapping[str, Any] | None) -> dict[str, Any]:
    return {key.removeprefix("^").removeprefix(r"(text_model\.)?"): value for key, value in (pattern or {}).items()}


@contextmanager
def _all_or_nothing(model: Any, adapter_name: str, peft_config: dict[str, Any]) -> Iterator[None]:
    """If the block fails, remove the new adapter, so that the others are unchanged."""
    trained, active, before = list[Any](), dict[Any, list[str]](), set[Any]()
    for module in model.modules():
        trained += [
            (parameter, parameter.requires_grad) for parameter in module._parameters.values() if parameter is not None
        ]
        if isinstance(module, BaseTunerLayer):
            active[module] = list(module.active_adapters)
            if layers.has_adapter(cast(nn.Module, module), adapter_name):
                before.add(module)
    try:
        yield
    except Exception:
        for path, layer in list(model.named_modules()):
            if isinstance(layer, BaseTunerLayer) and layer not in active:
                parent, _, name = path.rpartition(".")
                setattr(model.get_submodule(parent), name, layer.base_layer)  # type: ignore[attr-defined]
        for _, layer in list(layers.layers(model, adapter_name)):
            if layer not in before:
                layer.delete_adapter(adapter_name)
        for layer, names in active.items():
            layer.set_adapter(names)
        for parameter, was in trained:
            parameter.requires_grad_(was)
        if not before:
            peft_config.pop(adapter_name, None)
        if not peft_config and hasattr(model, "_hf_peft_config_loaded"):
            model._hf_peft_config_loaded = False  # otherwise peft_config, which was removed, is expected to exist
        raise


def injecting(stock: Method) -> Method:
    """Wraps `inject_adapter` of PEFT's LoRA and mixed tuners."""

    def inject_adapter(self: Any, model: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Inject with this package's choice of modules and ranks, and then attach the adapter's type to the layers."""
        with adapted_models.CHANGING:
            inject_in_turn(self, model, adapter_name, *args, **kwargs)

    def inject_in_turn(self: Any, model: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        registry.detach(model, adapter_name)  # remove leftovers of a deleted adapter with this name
        config: Any = registry.restored(self.peft_config[adapter_name])
        if not isinstance(config, base.AdapterConfig):
            stock(self, model, adapter_name, *args, **kwargs)
            return
        config = self.peft_config[adapter_name] = config.for_model()
        inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model

        def inject(rule: Rule) -> None:
            self._rule = rule
            try:
                stock(self, model, adapter_name, *args, **kwargs)
            finally:
                del self._rule  # it cannot be pickled with the model

        _settle(inner, adapter_name, config, self.peft_config, inject)

    return inject_adapter


def _settle(
    inner: Any, adapter_name: str, config: Any, configs: dict[str, Any], inject: Callable[[Rule], None]
) -> None:
    """Inject an adapter with the ranks that follow from its config for this model, and store them in the config."""
    asked = config.asked()
    try:
        with _all_or_nothing(inner, adapter_name, configs):
            config.check_options()  # again, since options may have been set after the config was created
            if config.target_modules is None:
                config.target_modules = set(registry.covered(inner, config))
            if config.resolved:
                rule: Rule = _Resolved(config)
            else:
                rule = RankRule(config, [path for path, _, _ in base_layers(inner)], by_class(inner))
            inject(rule)
            config.decide(_decided(inner, adapter_name, config), asked)
            registry.type_of(config).attach(inner, adapter_name, config)  # other types are already detached
    except Exception:
        config.undecide(asked)
        raise
    adapted_models.remember(inner)


def inject_at(model: nn.Module, config: LoraConfig, adapter_name: str, paths: Collection[str]) -> bool:
    """Inject an adapter of this package into known layers directly, without PEFT's search.

    Args:
        model: The model, without wrappers.
        config: The adapter's config, `resolved`.
        adapter_name: Its name, which must be unused in the model.
        paths: Its layers.

    Returns:
        Whether the adapter was injected; if not, nothing is changed, and PEFT must inject it.
    """
    places = grafting.places(model, paths)
    if places is None:
        return False
    registry.detach(model, adapter_name)
    restored: Any = registry.restored(config)
    configs = getattr(model, "peft_config", None)
    configs = {} if configs is None else configs

    def inject(rule: Rule) -> None:
        configs[adapter_name] = restored
        places.put(adapter_name, {path: rule(path, place.target) for path, place in places.by_path.items()})
        model.peft_config = configs  # type: ignore[assignment]

    _settle(model, adapter_name, restored, configs, inject)
    return True


def _decided(inner: Any, adapter_name: str, config: Any) -> dict[str, Any]:
    """Target modules, ranks and alphas from the injected layers; AdapterError if there are no layers."""
    decided = {
        path.removeprefix(_PEFT_MODEL_PREFIX): RankAlpha(layer.r[adapter_name], layer.lora_alpha[adapter_name])
        for path, layer in layers.layers(inner, adapter_name)
    }
    if not decided:
        raise AdapterError(f"adapter {adapter_name} would have no effect: no module has a rank above 0")
    return patterns_of(decided, config.r, config.lora_alpha)


def unloading(stock: Method) -> Method:
    """Wraps `_unload_and_optionally_merge` of both tuners."""

    def _unload_and_optionally_merge(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Unload as PEFT does, and detach the adapters' types from the model."""
        unloaded = stock(self, *args, **kwargs)
        for adapter_name in self.peft_config:
            registry.detach(unloaded, adapter_name)
        return unloaded

    return _unload_and_optionally_merge


def creating(stock: Method) -> Method:
    """Wraps `_create_and_replace` of the LoRA tuner, which the mixed tuner calls too."""

    def _create_and_replace(
        self: Any,
        lora_config: Any,
        adapter_name: str,
        target: Any,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        if isinstance(lora_config, base.AdapterConfig):
            path = current_key.removeprefix(_PEFT_MODEL_PREFIX)
            layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
            if isinstance(layer, (nn.Embedding, nn.MultiheadAttention)):
                raise AdapterError(
                    f"{path} is {type(layer).__name__}, but {type(lora_config).__name__} is for linear layers and "
                    "convolutions: remove it from target_modules, or use peft.LoraConfig"
                )
            decided = self._rule(path, layer)
            if decided.rank == 0:
                return
            lora_config = copy.copy(lora_config)
            lora_config.r, lora_config.lora_alpha = decided.rank, decided.alpha
            lora_config.rank_pattern, lora_config.alpha_pattern = {}, {}
        stock(self, lora_config, adapter_name, target, target_name, parent, current_key=current_key, **kwargs)

    return _create_and_replace


def combining(stock: Method) -> Method:
    """Wraps `add_weighted_adapter` of the LoRA tuner."""

    def add_weighted_adapter(self: Any, adapters: list[str], *args: Any, **kwargs: Any) -> None:
        """Combine adapters into a new plain LoRA as PEFT does, in the state in which they are currently used."""
        first: Any = self.peft_config.get(adapters[0]) if adapters else None
        try:
            if first is not None:  # PEFT copies the first adapter's config for the new one
                self.peft_config[adapters[0]] = registry.type_of(first).plain(first)
            with registry.as_used(self.model, adapters):
                stock(self, adapters, *args, **kwargs)
        finally:
            if first is not None:
                self.peft_config[adapters[0]] = first

    return add_weighted_adapter
