"""Refuses options that are known but not supported; each declares the reason (`Option.unsupported`)."""

from lora_adapters.train.errors import OptionError
from lora_adapters.train.options.option import options_of
from lora_adapters.train.options.settings import Given, Settings


def unsupported(kind: type[Given]) -> dict[str, str]:
    """Name -> reason of the options of `kind` that are refused."""
    return {name: option.unsupported for name, option in options_of(kind).items() if option.unsupported}


UNSUPPORTED = unsupported(Settings)


def refuse(settings: Given) -> None:
    """Raise OptionError for the first unsupported option that differs from its default."""
    known = options_of(type(settings))
    for name, reason in unsupported(type(settings)).items():
        if getattr(settings, name) != known[name].default:
            raise OptionError(f"{known[name].flag}: {reason}")
