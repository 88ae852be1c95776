"""Options as dataclass fields: flag, help, range, default, tables in a dataset file and metadata entry.

`option(...)` creates the field; its annotation defines the type. The parsers, the checks of configuration files,
--help, the metadata of saved adapters and the table in the documentation are all generated from these fields.
"""

import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_adapters.convert.parsing import number

# Tables of a dataset configuration, and the combinations of them that options allow.
TABLES = {"G": "[general]", "D": "[[datasets]]", "S": "[[datasets.subsets]]"}
ANYWHERE, DATASET, SUBSET = "GDS", "GD", "S"
_PARSERS: dict[type, Callable[[str], Any]] = {int: int, float: number, str: str}


@dataclass(frozen=True)
class Inert:
    """A case in which an option has no effect, so that it is reset to its default with a warning.

    Args:
        when: Called with the option's value and all settings; returns True in this case.
        why: The reason, with placeholders {value} and {settings.NAME}.
    """

    when: Callable[[Any, Any], bool]
    why: str


@dataclass(frozen=True)
class Option:
    """The definition of an option. `option` creates it, and `options_of` adds name, type and default of the field.

    Args:
        help: One line for --help and the documentation.
        unset: Describes the behaviour if the option is not given, for an option without a default value.
        flag: The flag on the command line; by default -- and the field's name.
        parse: Converts text to the value; by default that of the type. Raises ValueError or argparse.ArgumentTypeError.
        read: Converts a value from a dataset file. Raises ValueError with a description of valid values.
        choices: The allowed values.
        metavar: The name of the value in --help.
        at_least_one: Whether an option with several values needs at least one.
        at_least, at_most, above: Limits of a number.
        range_error: Replaces the default message for a number outside of its limits.
        scope: Tables of a dataset file that may contain the option (letters of TABLES); empty for none.
        toml_name: The name in a dataset file, if it differs.
        metadata: The key of the entry in a saved adapter's metadata; None for no entry.
        unsupported: The reason why the option is refused; None if it is supported.
        inert: Cases in which the option has no effect.
        unread: Called with all settings; returns True if the option is not used, so that an invalid value is ignored.
        goes_with: The option that this one needs to have an effect; if that is refused, so is this.
        secret: True for keys and tokens, which are never written to files.
    """

    help: str
    unset: str = "none"
    flag: str = ""
    parse: Callable[[str], Any] | None = None
    read: Callable[[Any], Any] | None = None
    choices: tuple[Any, ...] | None = None
    metavar: str | None = None
    at_least_one: bool = False
    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    range_error: str | None = None
    scope: str = ""
    toml_name: str | None = None
    metadata: str | None = None
    unsupported: str | None = None
    inert: tuple[Inert, ...] = ()
    unread: Callable[[Any], bool] | None = None
    goes_with: str = ""
    secret: bool = False
    # set by `options_of` from the dataclass
    name: str = ""
    default: Any = None
    kind: type = str
    many: bool = False

    @property
    def is_flag(self) -> bool:
        """Whether the option is a switch, without a value on the command line."""
        return self.kind is bool

    @property
    def shown_default(self) -> str:
        """The default as text: on or off for a switch, `unset` for an option without a default value."""
        if self.is_flag:
            return "on" if self.default else "off"
        if self.default is None or self.default == "":
            return self.unset
        return str(self.default)

    @property
    def limits(self) -> str:
        """The limits as text, such as "at least 1" or "from 0 to 1"; empty if there are none."""
        if self.at_least is not None and self.at_most is not None:
            return f"from {self.at_least} to {self.at_most}"
        if self.at_least is not None:
            return f"at least {self.at_least}"
        if self.above is not None:
            return f"above {self.above}"
        return f"at most {self.at_most}" if self.at_most is not None else ""

    def allows(self, value: float) -> bool:
        """Whether a number is within the limits."""
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.at_most is None or value <= self.at_most)
            and (self.above is None or value > self.above)
        )


def option(
    default: Any, help: str, *, metadata: str | bool = False, choices: Sequence[Any] | None = None, **facts: Any
) -> Any:
    """Create a dataclass field that defines an option.

    Args:
        default: The value if the option is not given.
        help: One line, without the default.
        metadata: The key of its entry in the metadata of a saved adapter; True is ss_ and the name of the field.
        choices: The allowed values; None allows all.
        **facts: Further fields of `Option`.

    Returns:
        The field.
    """
    made = Option(help, metadata="ss_" if metadata is True else metadata or None,
                  choices=None if choices is None else tuple(choices), **facts)  # fmt: skip
    return dataclasses.field(default=default, metadata={"option": made})


def options_of(kind: type) -> Mapping[str, Option]:
    """Name -> Option for every field of the dataclass `kind` that was created with `option`."""
    return _options_of(kind)


@functools.cache
def _options_of(kind: Any) -> Mapping[str, Option]:
    hints = typing.get_type_hints(kind)
    return types.MappingProxyType(
        {
            field.name: _completed(field, hints[field.name])
            for field in dataclasses.fields(kind)
            if "option" in field.metadata
        }
    )


def groups(kind: type) -> dict[str, list[str]]:
    """Title -> names of options, for each base class of `kind` that has a `title`."""
    own = [base for base in kind.__mro__ if "title" in vars(base)]
    return {vars(base)["title"]: list(options_of(base)) for base in own}


def _completed(field: Any, hint: Any) -> Option:
    """The option of a field, with its name, default, type and parser."""
    declared: Option = field.metadata["option"]
    kind, many = _type(hint)
    return dataclasses.replace(
        declared,
        name=field.name,
        default=field.default,
        kind=kind,
        many=many,
        flag=declared.flag or f"--{field.name}",
        parse=declared.parse or _PARSERS.get(kind),
        metadata=f"ss_{field.name}" if declared.metadata == "ss_" else declared.metadata,
    )


def _type(hint: Any) -> tuple[type, bool]:
    """(type of a value, whether it is a list) of an annotation such as int, str | None or list[float] | None."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next((part for part in typing.get_args(hint) if part is not type(None)), str)
    if typing.get_origin(hint) is list:
        return typing.get_args(hint)[0], True
    return typing.get_origin(hint) or hint, False
