"""The average of several adapters, such as the saves of one training."""

from collections.abc import Mapping

from lora_adapters.convert.adapter import Adapter
from lora_adapters.convert.deltas.averaging import mean
from lora_adapters.convert.deltas.base import Delta
from lora_adapters.convert.deltas.svd import Fit, with_rank_facts
from lora_adapters.convert.errors import AdapterError
from lora_adapters.convert.families.names import ModuleName
from lora_adapters.convert.formats.metadata import DyLora, merged_facts
from lora_adapters.convert.models.merging import gathered
from lora_adapters.convert.progress import progress


def average(adapters: Mapping[str, Adapter]) -> tuple[Adapter, dict[ModuleName, Fit]]:
    """The mean of the changes of adapters, at their ranks.

    Args:
        adapters: The adapters by their names in error messages. A module that one does not have is not changed by it.

    Returns:
        The average, a DyLoRA where all are (see `deltas.averaging.mean`), and how well each module of it meets the
        exact mean.

    Raises:
        AdapterError: they are for different models, of kinds that have no mean of the same kind, or DyLoRAs that can be
            cut to different ranks.
    """
    dylora = _dylora(adapters)
    modules: dict[ModuleName, Delta] = {}
    fits: dict[ModuleName, Fit] = {}
    parts = gathered(adapters, [1.0] * len(adapters))
    for module, changes in progress(parts.items(), "averaging", len(parts)):
        try:
            modules[module], fits[module] = mean(changes, len(adapters), dylora.unit if dylora else None)
        except AdapterError as error:
            raise AdapterError(f"{module}: {error}") from None
    first = next(iter(adapters.values()))
    facts = {
        **first.plain_metadata(),
        **merged_facts([adapter.metadata for adapter in adapters.values()], list(adapters)),
    }
    result = Adapter(modules, with_rank_facts(modules, facts))
    return (result.as_dylora(dylora) if dylora else result), fits


def _dylora(adapters: Mapping[str, Adapter]) -> DyLora | None:
    """What all of them say about their ranks; None if none is a DyLoRA."""
    (first, *others), (name, *names) = [adapter.dylora for adapter in adapters.values()], adapters
    for other, dylora in zip(names, others, strict=True):
        ours, theirs = (adapter and (adapter.unit, adapter.rank_scaling) for adapter in (first, dylora))
        if ours != theirs:
            raise AdapterError(f"{name} is {_said(first)}, but {other} is {_said(dylora)}: they have no average")
    return first


def _said(dylora: DyLora | None) -> str:
    if dylora is None:
        return "no DyLoRA"
    return f"a DyLoRA of unit {dylora.unit} and rank_scaling {dylora.rank_scaling}"
