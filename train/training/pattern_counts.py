"""Counts the modules that each regular expression of --network_args applies to."""

import logging
from typing import Any

from lora_adapters.kohya_options import NetworkOptions
from lora_adapters.module_patterns import left_out, names_in, tally
from lora_adapters.types.registry import covered

log = logging.getLogger(__name__)


def pattern_counts(asked: NetworkOptions, trained: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Count the modules that each regular expression of --network_args applies to.

    Args:
        asked: The network options.
        trained: The trained models, by component.

    Returns:
        Option -> pattern -> count. For exclude_patterns the excluded modules are counted, for other options the
            modules with an adapter.
    """
    config, kept, gone = asked.config, list[tuple[str, ...]](), list[tuple[str, ...]]()
    for model in trained.values():
        paths = covered(model, config)
        for names in map(names_in(paths), paths):
            (gone if left_out(config.include_patterns, config.exclude_patterns, names) else kept).append(names)
    choices = {
        "include_patterns": tally(config.include_patterns or [], kept),
        "exclude_patterns": tally(config.exclude_patterns or [], gone),
        "network_reg_dims": tally(config.reg_dims or {}, kept),
        "network_reg_lrs": tally(asked.reg_lrs or {}, kept),
    }
    return {option: counts for option, counts in choices.items() if counts}


def warn_of_idle_patterns(asked: NetworkOptions, trained: dict[str, Any]) -> None:
    """Warn of patterns that have no effect."""
    for option, counts in pattern_counts(asked, trained).items():
        for pattern in (pattern for pattern, count in counts.items() if not count):
            log.warning("network_args %s: %s matches no module, or only modules of earlier patterns", option, pattern)
