"""Finding the adapter type for a name, a config, a layer or a file's metadata."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from peft import LoraConfig
from torch import nn

from lora_adapters.convert.deltas.base import Delta, with_article
from lora_adapters.convert.deltas.low_rank import LowRank

# Imported as modules: each may be only partly loaded, if its import of peft loads this one.
from . import REGISTERED, base, layers

if TYPE_CHECKING:
    from .adapter_type import AdapterType


@cache
def types() -> "tuple[AdapterType, ...]":
    """All registered types, plain LoRA first."""
    return tuple(import_module(f"{__package__}.{folder}.config").TYPE for folder in REGISTERED)


def plain() -> "AdapterType":
    """The default type."""
    return types()[0]


def type_named(name: str) -> "AdapterType | None":
    """The type with this name in files; None if it is unknown."""
    return next((kind for kind in types() if kind.name == name), None)


def type_of(config: Any) -> "AdapterType":
    """The type of a config; plain LoRA for PEFT's own configs."""
    by_config = {kind.config: kind for kind in types()}
    return next((by_config[cls] for cls in type(config).__mro__ if cls in by_config), plain())


def type_in(layer: Any, adapter_name: str) -> "AdapterType | None":
    """The type of an adapter in a layer; None for PEFT's LoRA variants."""
    variant = layer.lora_variant.get(adapter_name)
    if variant is None:
        return plain()
    return next((kind for kind in types() if kind.variant is not None and isinstance(variant, kind.variant)), None)


def is_ours(model: nn.Module, adapter_name: str) -> bool:
    """Whether the adapter has one of this package's configs."""
    return isinstance(getattr(model, "peft_config", {}).get(adapter_name), base.AdapterConfig)


# --- files -----------------------------------------------------------------------------------------------------------


def restored(config: LoraConfig) -> LoraConfig:
    """Convert a config to the type named in `auto_mapping`; PEFT's own configs are returned unchanged."""
    facts = dict((config.auto_mapping or {}).get(base.FACTS) or {})
    kind = type_named(facts.pop("type", ""))
    if kind is None or isinstance(config, base.AdapterConfig):
        return config
    plain_fields = {field.name: getattr(config, field.name) for field in fields(LoraConfig) if field.init}
    known = {field.name for field in fields(kind.config)}
    return kind.config(**{**plain_fields, **{name: value for name, value in facts.items() if name in known}})


def facts_of_config(config: Any) -> dict[str, Any]:
    """The type of a config and the values of the type's own fields; plain LoRA by default."""
    kind = type_of(config)
    facts = {name: getattr(config, name) for name in base.fields_beyond(kind.config, base.AdapterConfig)}
    return {"type": kind.name if facts else plain().name, **facts}


def facts_of_metadata(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The type in kohya's metadata and the values of the type's own fields; plain LoRA by default."""
    for kind in types():
        if (facts := kind.facts_of(metadata)) is not None:
            return {"type": kind.name, **facts}
    return {"type": plain().name}


def facts_for(config: Any, metadata: Mapping[str, str], explicit: Collection[str]) -> dict[str, Any]:
    """The facts of a config's type: `explicit` fields are taken from the config, the others from the metadata."""
    kind, own = type_of(config), facts_of_config(config)
    of_file = kind.facts_of(metadata)
    return own if of_file is None else {**own, **of_file, **{name: own[name] for name in own if name in explicit}}


def metadata_of(config: Any, metadata: Mapping[str, str]) -> dict[str, str]:
    """Entries of kohya's metadata that identify the type of a config."""
    return type_of(config).metadata(config, metadata)


def config_options(modules: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a `LoraConfig` that gives each module its own rank and alpha.

    Args:
        modules: An object with rank and alpha for each path.
        facts: The type and its fields, as returned by `facts_of_metadata`.

    Returns:
        The options, from which `restored` creates a config of the type.
    """
    own = {name: value for name, value in facts.items() if name != "type"}
    kind = type_named(facts["type"]) or plain()
    options = kind.config_options(modules, own)
    facts = {"type": kind.name, **options.pop("facts"), "resolved": True}
    return {**options, "auto_mapping": {base.FACTS: facts}}


def covered(model: nn.Module, config: Any) -> list[str]:
    """Paths of the layers of a model that `config` adapts; AdapterError if there are none."""
    return type_of(config).covered(model, config)


# --- models ----------------------------------------------------------------------------------------------------------


def attach(model: nn.Module, adapter_name: str, config: Any) -> None:
    """Attach the type of a config to the LoRA layers of an adapter, and detach other types."""
    kind = type_of(config)
    for other in types():
        if other is not kind:
            other.detach(model, adapter_name)
    kind.attach(model, adapter_name, config)


def detach(model: nn.Module, adapter_name: str) -> None:
    """Detach the type of an adapter from its layers."""
    for kind in types():
        kind.detach(model, adapter_name)


def refit(model: nn.Module) -> None:
    """Adjust to layers whose factors have been padded."""
    for kind in types():
        kind.refit(model)


def delta_of(layer: Any, adapter_name: str, stabilized: bool = False) -> Delta:
    """The change of an adapter in a layer, as stored in a file.

    Args:
        layer: A LoRA layer that has the adapter.
        adapter_name: The adapter's name.
        stabilized: Whether its scale is alpha/sqrt(rank) (rsLoRA).

    Returns:
        The change, with views of the live weights where possible.
    """
    return (type_in(layer, adapter_name) or plain()).delta(layer, adapter_name, stabilized)


def parts_of(layer: Any, adapter_name: str) -> Iterator[tuple[str, nn.Module]]:
    """(kind, module) of all trainable modules of an adapter in a layer; see `AdapterType.parts`."""
    return (type_in(layer, adapter_name) or plain()).parts(layer, adapter_name)


def beyond_lora(layer: Any, adapter_name: str) -> str | None:
    """The feature of an adapter in a layer that low-rank pairs cannot represent; None for plain low-rank pairs."""
    more = beyond_deltas(layer, adapter_name)
    if more is None and not isinstance(change := delta_of(layer, adapter_name), LowRank):
        more = with_article(change.kind)
    return more


def beyond_deltas(layer: Any, adapter_name: str) -> str | None:
    """The feature of an adapter in a layer that no type of this package supports; None if `delta_of` is complete."""
    if layers.magnitude(layer, adapter_name) is not None:
        return "DoRA's magnitudes"
    if getattr(layers.factors(layer, adapter_name).up, "bias", None) is not None:
        return "biases (lora_bias)"
    known = type_in(layer, adapter_name) is not None
    return None if known else type(layer.lora_variant[adapter_name]).__name__


@contextmanager
def as_used(model: nn.Module, adapter_names: list[str]) -> Iterator[None]:
    """A context in which the factors of the adapters, read as plain LoRA, give the current change of their layers."""
    with ExitStack() as stack:
        for kind in types():
            stack.enter_context(kind.as_used(model, adapter_names))
        yield
