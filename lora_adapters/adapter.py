"""Implements the methods of `Adapter` for live models and the Hub.

`lora_adapters.convert.live` declares the methods; `lora_adapters.plugin` registers this module there.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from lora_adapters.convert.adapter import Adapter
from lora_adapters.convert.errors import AdapterError
from lora_adapters.convert.families.registry import BASE_VERSION, by_class, by_live_models, denoisers
from lora_adapters.types.registry import metadata_of

from . import pipeline, token_embeddings
from .injection import extract_changes, unwrapped

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

__all__ = ["Adapter", "from_models", "from_pipeline", "push_to_hub", "to_pipeline"]
A = TypeVar("A", bound=Adapter)


def from_models(
    adapter_type: type[A],
    models: Mapping[str, Any],
    adapter_name: str = "default",
    metadata: Mapping[str, str] | None = None,
) -> A:
    """Read an adapter from live models; see `Adapter.from_models`."""
    models = {component: unwrapped(model) for component, model in models.items()}
    modules, of_type = {}, dict[str, str]()
    for component, model in models.items():
        if adapter_name in getattr(model, "peft_config", {}):
            modules.update(extract_changes(model, component, adapter_name))
            of_type = of_type or metadata_of(model.peft_config[adapter_name], metadata or {})
    if not modules:
        names = sorted({name for model in models.values() for name in getattr(model, "peft_config", {})})
        raise AdapterError(f"no adapter {adapter_name} in the models; they have: {', '.join(names) or 'none'}")
    facts = dict(metadata or {})
    by_classes = (by_class(model) for model in models.values())
    family = next((family for family in by_classes if family is not None), None)
    denoiser = next((models[name] for name in denoisers() if name in models), None)
    family = family or by_live_models(models, getattr(denoiser, "config", None))
    if family is not None and family.has(modules):  # a few modules alone may fit several families
        facts.setdefault(BASE_VERSION, family.stated)
    return adapter_type(modules, {**facts, **of_type})


def from_pipeline(
    adapter_type: type[A], pipe: Any, adapter_name: str = "default", metadata: Mapping[str, str] | None = None
) -> A:
    """Read an adapter from a pipeline; see `Adapter.from_pipeline`."""
    models = pipeline.adaptable_models(pipe)
    adapter = from_models(adapter_type, models, adapter_name, metadata)
    return adapter.replaced(embeddings=token_embeddings.embeddings_of(models, adapter_name))


def to_pipeline(adapter: Adapter, pipe: Any, adapter_name: str | None = None) -> None:
    """Load an adapter into a pipeline; see `Adapter.to_pipeline`."""
    pipeline.load_adapter(pipe, adapter, adapter_name)


def push_to_hub(adapter: Adapter, repo_id: str, **options: Any) -> "CommitInfo":
    """Push an adapter to the Hub; see `Adapter.push_to_hub`."""
    from .hub import repository

    return repository.push_to_hub(adapter, repo_id, **options)
