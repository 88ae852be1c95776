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
        adapters: The adapters by their name in error messages. A module that an adapter lacks counts as a change of 0.

    Returns:
        The average, a DyLoRA if all adapters are (see `deltas.averaging.mean`), and the approximation error of each
        module.

    Raises:
        AdapterError: The adapters are for different models, of kinds that cannot be averaged, or DyLoRAs with different
            options.
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
    """The common DyLoRA options of all adapters; None if none is a DyLoRA. AdapterError if they differ."""
    (first, *others), (name, *names) = [adapter.dylora for adapter in adapters.values()], adapters
    for other, dylora in zip(names, others, strict=True):
        ours, theirs = (adapter and (adapter.unit, adapter.rank_scaling) for adapter in (first, dylora))
        if ours != theirs:
            raise AdapterError(f"{name} is {_said(first)}, but {other} is {_said(dylora)}: they cannot be averaged")
    return first


def _said(dylora: DyLora | None) -> str:
    if dylora is None:
        return "not a DyLoRA"
    return f"a DyLoRA of unit {dylora.unit} and rank_scaling {dylora.rank_scaling}"
