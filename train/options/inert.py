"""Resets option values that have no effect, with a warning instead of an error.

Configurations are shared between programs, and kohya's trainer accepts such values silently. Each option declares
these cases (`Option.inert`).
"""

import logging
from typing import Any

from lora_adapters.train.options.option import options_of
from lora_adapters.train.options.settings import Settings

log = logging.getLogger(__name__)

_SAMPLES = ("sample_every_n_steps", "sample_every_n_epochs", "sample_at_first")


def leave_out_inert(settings: Settings) -> None:
    """Reset values in `settings` that have no effect to their defaults, with a warning for each.

    Args:
        settings: Options from `parse` or `settings`; changed in place.
    """
    for name, option in options_of(type(settings)).items():
        value = getattr(settings, name)
        case = next((inert for inert in option.inert if value != option.default and inert.when(value, settings)), None)
        if case:
            log.warning("--%s is left out: %s", name, case.why.format(value=value, settings=settings))
            _reset(settings, name, option.default)
    _leave_out_samples(settings)


def _leave_out_samples(settings: Settings) -> None:
    """Reset the options for when to draw sample images if there are no prompts."""
    given = [name for name in _SAMPLES if getattr(settings, name)]
    if given and not settings.sample_prompts:
        log.warning("--%s: no sample images are drawn without --sample_prompts, a file of prompts", given[0])
        for name in given:
            _reset(settings, name, options_of(type(settings))[name].default)


def _reset(settings: Settings, name: str, default: Any) -> None:
    setattr(settings, name, default)
    settings.given -= {name}
