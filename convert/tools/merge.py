"""Weighted sums of adapters, and merging adapters into a model."""

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
    """The exact weighted sum of adapters, Σ weight · ΔW.

    Args:
        adapters: The adapters, by their names in error messages. They need not have the same modules.
        weights: The weight of each adapter.

    Returns:
        The sum. Its ranks are the sums of the ranks. A module that is not low-rank in all adapters becomes a
        `deltas.sum.Sum`, which must be reduced before saving. The metadata contain the entries about the base model,
        and the tags and trigger words of all adapters.

    Raises:
        AdapterError: The adapters are for different models, or a module has different shapes.
    """
    modules, parts_of = {}, gathered(adapters, weights)
    pairs = (as_pair(part) for parts in parts_of.values() for part in parts)
    scale = common_scale(pair for pair in pairs if pair is not None)  # the same for all modules: see `to_narrow`
    for module, parts in parts_of.items():
        try:
            modules[module] = added(parts, scale)
        except AdapterError as error:
            names = [name for name, adapter in adapters.items() if module in adapter.modules]
            raise AdapterError(f"{' and '.join(names)} differ in {module}: {error}") from None
    _warn_of_embeddings(adapters)
    return Adapter(modules, sum_facts([part.metadata for part in adapters.values()]))


def _warn_of_embeddings(adapters: Mapping[str, Adapter]) -> None:
    for name, adapter in adapters.items():
        warn_of_embeddings(adapter.embeddings, f"the sum of adapters ({name})")


def combination(adapters: Mapping[str, Adapter], weights: Sequence[float], how: Combination) -> Adapter:
    """Combine adapters by pruning (TIES, DARE, magnitude); see `Adapter.combine`.

    Args:
        adapters: The adapters, by their names in error messages.
        weights: The weight of each adapter.
        how: The method and its density.

    Returns:
        The combined adapter, whose changes are dense.

    Raises:
        AdapterError: The adapters are for different models, or a module has different shapes.
    """
    modules = combined_changes(adapters, weights, how)
    _warn_of_embeddings(adapters)
    return Adapter(modules, sum_facts([adapter.metadata for adapter in adapters.values()]))


def fitting(checkpoint: Checkpoint, adapter: Adapter, name: str) -> tuple[Adapter, list[ModuleName]]:
    """Split an adapter's modules into those that a model has and those that it lacks.

    Args:
        checkpoint: The model.
        adapter: The adapter.
        name: The adapter's name in error messages.

    Returns:
        The adapter with the modules of the model, and the other modules.

    Raises:
        AdapterError: The model has none of the modules.
    """
    known = checkpoint.parameters
    missing = [module for module in adapter.modules if module not in known]
    if len(missing) == len(adapter.modules):
        raise AdapterError(f"{checkpoint.path} has none of the modules that {name} changes")
    kept = {module: change for module, change in adapter.modules.items() if module in known}
    return adapter.with_modules(kept), missing
