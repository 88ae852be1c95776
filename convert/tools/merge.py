"""Weighted sums of adapters, and adapters put into a model's weights."""

from collections.abc import Mapping, Sequence

from lora_adapters.convert.adapter import Adapter
from lora_adapters.convert.deltas.combined import Combination
from lora_adapters.convert.deltas.low_rank import common_scale
from lora_adapters.convert.deltas.sum import added, as_pair
from lora_adapters.convert.errors import AdapterError
from lora_adapters.convert.families.names import ModuleName
from lora_adapters.convert.formats.kinds import warn_of_embeddings
from lora_adapters.convert.formats.metadata import sum_facts
from lora_adapters.convert.models.merging import combined_changes, gathered, merge_into_model
from lora_adapters.convert.storage.checkpoint import Checkpoint

__all__ = ["combination", "fitting", "merge_into_model", "weighted_sum"]


def weighted_sum(adapters: Mapping[str, Adapter], weights: Sequence[float]) -> Adapter:
    """Σ weight · ΔW, exactly, of adapters under the names that errors shall show; modules of only some stay.

    Modules that are not pairs in all of them become a `deltas.sum.Sum`, which no file holds before it is reduced.

    Metadata: the base model's, the tags and trigger words of all; AdapterError where adapters are for different models.
    """
    modules, parts_of = {}, gathered(adapters, weights)
    pairs = (as_pair(one) for parts in parts_of.values() for one in parts)
    scale = common_scale(pair for pair in pairs if pair is not None)  # one for all: see `low_rank.to_narrow`
    for module, parts in parts_of.items():
        try:
            modules[module] = added(parts, scale)
        except AdapterError as error:
            names = [name for name, adapter in adapters.items() if module in adapter.modules]
            raise AdapterError(f"{' and '.join(names)} differ in {module}: {error}") from None
    _warn_of_embeddings(adapters)
    return Adapter(modules, sum_facts([one.metadata for one in adapters.values()]))


def _warn_of_embeddings(adapters: Mapping[str, Adapter]) -> None:
    for name, adapter in adapters.items():
        warn_of_embeddings(adapter.embeddings, f"the sum of adapters ({name})")


def combination(adapters: Mapping[str, Adapter], weights: Sequence[float], how: Combination) -> Adapter:
    """As `Adapter.combine`, of adapters under the names that errors shall show."""
    modules = combined_changes(adapters, weights, how)
    _warn_of_embeddings(adapters)
    return Adapter(modules, sum_facts([one.metadata for one in adapters.values()]))


def fitting(checkpoint: Checkpoint, adapter: Adapter, name: str) -> tuple[Adapter, list[ModuleName]]:
    """The adapter without the modules that the model does not have, and those modules.

    AdapterError, with the adapter's name, where the model has none of its modules.
    """
    known = checkpoint.parameters
    missing = [module for module in adapter.modules if module not in known]
    if len(missing) == len(adapter.modules):
        raise AdapterError(f"{checkpoint.path} has none of the modules that {name} changes")
    kept = {module: one for module, one in adapter.modules.items() if module in known}
    return adapter.with_modules(kept), missing
