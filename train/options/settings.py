"""All options of the training program as one dataclass."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from lora_adapters.train.errors import OptionError
from lora_adapters.train.options.data import DataOptions
from lora_adapters.train.options.flow import FlowOptions
from lora_adapters.train.options.model import ModelOptions
from lora_adapters.train.options.option import options_of
from lora_adapters.train.options.output import OutputOptions
from lora_adapters.train.options.training import TrainingOptions

S = TypeVar("S", bound="Given")


class Given:
    """Base class that records which options were given by the command line, a configuration file or Python.

    `given` is a slot, not a field, so that vars() of the settings contains only options.
    """

    __slots__ = ("given",)
    given: frozenset[str]

    def __post_init__(self) -> None:
        self.given = frozenset()

    def given_options(self) -> dict[str, Any]:
        """Name -> value of the options that were given or differ from their default."""
        return {
            name: getattr(self, name)
            for name, option in options_of(type(self)).items()
            if name in self.given or getattr(self, name) != option.default
        }


@dataclass
class Settings(ModelOptions, TrainingOptions, FlowOptions, DataOptions, OutputOptions, Given):
    """The options of the training program, one attribute each, with the names of the command line."""


def made(kind: type[S], values: Mapping[str, Any]) -> S:
    """Create settings from values.

    Args:
        kind: The class of settings.
        values: Name -> value. All options but those with None count as given. An empty string counts as None if the
            default is None.

    Returns:
        The settings.
    """
    known = options_of(kind)
    kept = {name: None if value == "" and known[name].default is None else value for name, value in values.items()}
    result = kind(**kept)
    result.given = frozenset(name for name, value in kept.items() if value is not None)
    return result


def check_ranges(settings: Given) -> None:
    """Raise OptionError for the first number that is outside of its option's limits."""
    for name, option in options_of(type(settings)).items():
        value = getattr(settings, name)
        if isinstance(value, int | float) and not isinstance(value, bool) and not option.allows(value):
            if option.range_error:
                raise OptionError(f"{option.flag} {value}: {option.range_error}")
            raise OptionError(f"{option.flag} must be {option.limits}, not {value}")
