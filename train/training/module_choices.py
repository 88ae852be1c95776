"""Lists which modules the preset and the regular expressions of --network_args select, for --dry_run."""

from typing import Any

from lora_adapters.convert.deltas.base import alpha_in
from lora_adapters.convert.families.names import ModuleName
from lora_adapters.train.training import adapters
from lora_adapters.train.training.pattern_counts import pattern_counts
from lora_adapters.train.training.setup import Run
from lora_adapters.types.registry import delta_of


def choices(run: Run) -> list[str]:
    """The preset, the number of modules that each pattern selects and, with verbose=True, every trained module."""
    if run.settings.dim_from_weights:
        return []
    asked = adapters.options(run.settings, run.models.family)
    lines = [f"chosen by preset {asked.config.preset}"] if asked.config.preset else []
    ranks, rates = asked.config.reg_dims or {}, asked.reg_lrs or {}
    for option, counts in pattern_counts(asked, run.trained).items():
        lines.append(f"{option}:")
        for pattern, count in counts.items():
            rank = f", rank {ranks[pattern]}" if option == "network_reg_dims" else ""
            rate = f", learning rate {rates[pattern]:g}" if option == "network_reg_lrs" else ""
            gone = " left out" if option == "exclude_patterns" else ""
            lines.append(f"  {pattern}: {count} modules{gone}{rank}{rate}")
    if asked.verbose:
        layers = adapters.lora_layers(run.trained)
        lines += ["modules:", *(f"  {_described(name, layer)}" for name, layer in layers.items())]
    return lines


def _described(name: ModuleName, layer: Any) -> str:
    change = delta_of(layer, adapters.ADAPTER)
    alpha = alpha_in(change)
    numbers = "" if change.rank is None else f", rank {change.rank}" + ("" if alpha is None else f", alpha {alpha:g}")
    return f"{name}: {change.kind}{numbers}"
