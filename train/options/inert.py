"""Values that change nothing, and options that have no effect beside the others: left out with a warning, no error.

Configurations are handed on from program to program, and kohya's trainer takes these without a word. Which values these
are is declared with each option (`Option.inert`).
"""

import logging
from typing import Any

from lora_adapters.train.options.option import options_of
from lora_adapters.train.options.settings import Settings

log = logging.getLogger(__name__)

_SAMPLES = ("sample_every_n_steps", "sample_every_n_epochs", "sample_at_first")


def leave_out_inert(settings: Settings) -> None:
    """Put the defaults in place of values in `settings` that change nothing, each with a warning.

    Args:
        settings: options as `parse` or `settings` make them; changed in place.
    """
    for name, option in options_of(type(settings)).items():
        value = getattr(settings, name)
        case = next((inert for inert in option.inert if value != option.default and inert.when(value, settings)), None)
        if case:
            log.warning("--%s is left out: %s", name, case.why.format(value=value, settings=settings))
            _reset(settings, name, option.default)
    _leave_out_samples(settings)


def _leave_out_samples(settings: Settings) -> None:
    """The occasions for sample images where there are no prompts to draw them from."""
    given = [name for name in _SAMPLES if getattr(settings, name)]
    if given and not settings.sample_prompts:
        log.warning("--%s: no sample images are drawn without --sample_prompts, a file of prompts", given[0])
        for name in given:
            _reset(settings, name, options_of(type(settings))[name].default)


def _reset(settings: Settings, name: str, default: Any) -> None:
    setattr(settings, name, default)
    settings.given -= {name}
