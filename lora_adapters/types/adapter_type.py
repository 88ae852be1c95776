"""`AdapterType`, the interface of adapter types."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from torch import nn

from lora_adapters.convert.deltas.base import Delta
from lora_adapters.convert.formats.diffusers import lora_config
from lora_adapters.target_modules import covered

from . import layers

if TYPE_CHECKING:
    from .base import AdapterConfig


class NetworkArg(NamedTuple):
    """An option of kohya's --network_args: a parser of its text, and a description of valid values for messages."""

    parse: Callable[[str], Any]
    takes: str


def flag(text: str) -> bool:
    """True or False; ValueError for other text."""
    if text.lower() not in ("true", "false", "1", "0"):
        raise ValueError(text)
    return text.lower() in ("true", "1")


class AdapterType:
    """One type of adapter. The methods implement plain LoRA; other types override some of them.

    Attributes:
        name: The name in files, which is the config's class name without "Config".
        title: The name in messages.
        config: The class of the configs.
        network_modules: The names in kohya's --network_module, the default one first.
        network_args: Options of --network_args that only this type has; each is a field of the config.
        with_conv: The name of the type to use for the same --network_module if a rank for larger convolutions is given;
            None for this type.
        variant: The PEFT variant class that computes the layers; None for plain LoRA. If it has a method
            `gate_of_all(layer, adapter_name)`, it can be stacked with other adapters like plain LoRA: the method
            returns the factors of the components between down and up, (components,), or None if stacking is impossible.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    config: "type[AdapterConfig]"
    network_modules: ClassVar[tuple[str, ...]] = ()
    network_args: ClassVar[Mapping[str, NetworkArg]] = {}
    with_conv: ClassVar[str | None] = None
    variant: ClassVar[type | None] = None

    def training_args(self, args: Mapping[str, str]) -> dict[str, str]:
        """The --network_args of a training, completed by defaults that differ from those of the config."""
        return dict(args)

    # --- in files ------------------------------------------------------------------------------------------------

    def facts_of(self, metadata: Mapping[str, str]) -> dict[str, Any] | None:
        """The type's own fields from kohya's metadata; None if the adapter is not of this type."""
        return None

    def metadata(self, config: Any, metadata: Mapping[str, str]) -> dict[str, str]:
        """Entries of kohya's metadata that identify the type of an adapter with this config."""
        return {}

    def config_options(self, modules: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
        """Options of a `LoraConfig` with the rank and alpha of each module, and the type's own fields.

        Args:
            modules: Objects with a rank and an alpha, by the module's path.
            facts: The type's own fields.

        Returns:
            The options, with all of the type's own fields under "facts".
        """
        return {**lora_config(modules), "facts": dict(facts)}

    def fields(self, network_module: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of the config that depend on --network_module.

        Args:
            network_module: One of `network_modules`.
            given: The fields that follow from the other network options.

        Returns:
            Fields to add or to replace.
        """
        return {}

    def idle(self, network_module: str, network_args: Mapping[str, str]) -> dict[str, str]:
        """Options of this type that have no effect together with the others in `network_args`, each with the reason."""
        return {}

    # --- in models -----------------------------------------------------------------------------------------------

    def covered(self, model: nn.Module, config: Any) -> list[str]:
        """Paths of the layers to adapt if `config` has no target_modules; see `target_modules.covered`."""
        return covered(model, config.conv, config.preset)

    def attach(self, model: nn.Module, adapter_name: str, config: Any) -> None:
        """Make the existing LoRA layers of an adapter compute this type."""

    def detach(self, model: nn.Module, adapter_name: str) -> None:
        """Make an adapter of this type a plain LoRA again; does nothing for other types."""

    def refit(self, model: nn.Module) -> None:
        """Adjust to layers whose factors have been padded."""

    def delta(self, layer: Any, adapter_name: str, stabilized: bool = False) -> Delta:
        """The change of an adapter in a layer, as stored in a file; see `layers.low_rank`."""
        return layers.low_rank(layer, adapter_name, stabilized)

    def parts(self, layer: Any, adapter_name: str) -> Iterator[tuple[str, nn.Module]]:
        """The trainable modules of an adapter in a layer.

        Args:
            layer: A layer that has the adapter.
            adapter_name: The name of the adapter.

        Yields:
            (kind, module); LoRA+ uses another learning rate for the kind "up".
        """
        down, up = layers.factors(layer, adapter_name)
        yield "down", down
        if (magnitude := layers.magnitude(layer, adapter_name)) is not None:
            yield "magnitude", magnitude
        yield "up", up

    def as_used(self, model: nn.Module, adapter_names: list[str]) -> AbstractContextManager[None]:
        """A context in which the factors, read as plain LoRA, give the current change of the layers."""
        return nullcontext()

    def plain(self, config: Any) -> Any:
        """The config of the plain LoRA with the factors of `as_used`."""
        return config
