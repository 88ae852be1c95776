"""Options that the parser knows and the program refuses: each declares its reason (`Option.unsupported`)."""

from lora_adapters.train.errors import OptionError
from lora_adapters.train.options.option import options_of
from lora_adapters.train.options.settings import Settings

UNSUPPORTED: dict[str, str] = {
    name: option.unsupported for name, option in options_of(Settings).items() if option.unsupported
}


def refuse(settings: Settings) -> None:
    """Raise OptionError for the first unsupported option that has another value than its default."""
    for name, reason in UNSUPPORTED.items():
        if getattr(settings, name) != options_of(Settings)[name].default:
            raise OptionError(f"--{name}: {reason}")
