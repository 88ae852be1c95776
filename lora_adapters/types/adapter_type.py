"""What the rest of the package asks an adapter type for."""

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
    """An option of kohya's --network_args: how its text is read, and what it takes, for the error where it does not."""

    parse: Callable[[str], Any]
    takes: str


def flag(text: str) -> bool:
    """True or False; ValueError for other text."""
    if text.lower() not in ("true", "false", "1", "0"):
        raise ValueError(text)
    return text.lower() in ("true", "1")


class AdapterType:
    """One type of adapter. The methods here are plain LoRA's; a type overrides those in which it differs.

    Attributes:
        name: The name in files, which is the config's class name without "Config".
        title: The name in messages.
        config: The class of its configs.
        network_modules: Its names in kohya's --network_module, the usual one first.
        network_args: Options of --network_args that only this type has; each is a field of the config.
        with_conv: The name of the type that --network_module means where a rank for larger convolutions is given;
            None: this one.
        variant: The class by which PEFT computes its layers; None: as plain LoRA. With a method `gate_of_all(layer,
            adapter_name)` it is stacked with others, as plain LoRA is: what its components are multiplied with between
            down and up, (components,), or None if there is more to a call.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    config: "type[AdapterConfig]"
    network_modules: ClassVar[tuple[str, ...]] = ()
    network_args: ClassVar[Mapping[str, NetworkArg]] = {}
    with_conv: ClassVar[str | None] = None
    variant: ClassVar[type | None] = None

    def training_args(self, args: Mapping[str, str]) -> dict[str, str]:
        """The --network_args of a training, with those that differ from the config's defaults unless they are given."""
        return dict(args)

    # --- in files ------------------------------------------------------------------------------------------------

    def facts_of(self, metadata: Mapping[str, str]) -> dict[str, Any] | None:
        """The type's own fields by kohya's metadata; None if it does not say that the adapter is of this type."""
        return None

    def metadata(self, config: Any, metadata: Mapping[str, str]) -> dict[str, str]:
        """Entries of kohya's metadata that say that an adapter of `config` is of this type."""
        return {}

    def config_options(self, modules: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
        """Options of a `LoraConfig` with the rank and alpha of each module, and the type's own fields.

        Args:
            modules: What has a rank and an alpha, by the module's path.
            facts: The type's own fields.

        Returns:
            The options, with all of the type's own fields under "facts".
        """
        return {**lora_config(modules), "facts": dict(facts)}

    def fields(self, network_module: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of the config that the name of --network_module decides.

        Args:
            network_module: One of `network_modules`.
            given: The fields from the other network options.

        Returns:
            Fields to add or to replace.
        """
        return {}

    def idle(self, network_module: str, network_args: Mapping[str, str]) -> dict[str, str]:
        """Options of this type that change nothing beside others of `network_args`, each with the reason."""
        return {}

    # --- in models -----------------------------------------------------------------------------------------------

    def covered(self, model: nn.Module, config: Any) -> list[str]:
        """Paths of the layers that an adapter of `config` has without target_modules; see `target_modules.covered`."""
        return covered(model, config.conv, config.preset)

    def attach(self, model: nn.Module, adapter_name: str, config: Any) -> None:
        """Make the LoRA layers of an adapter, which are in the model, compute what this type does."""

    def detach(self, model: nn.Module, adapter_name: str) -> None:
        """Make an adapter of this type plain LoRA again; nothing if it is of another type."""

    def refit(self, model: nn.Module) -> None:
        """Follow layers whose factors have been padded."""

    def delta(self, layer: Any, adapter_name: str, stabilized: bool = False) -> Delta:
        """The change of weight of an adapter in a layer, as a file has it; see `layers.low_rank`."""
        return layers.low_rank(layer, adapter_name, stabilized)

    def parts(self, layer: Any, adapter_name: str) -> Iterator[tuple[str, nn.Module]]:
        """The modules of an adapter in a layer that may be trained.

        Args:
            layer: A layer that has the adapter.
            adapter_name: The name of the adapter.

        Yields:
            (kind, module); LoRA+ has another learning rate for the kind "up".
        """
        down, up = layers.factors(layer, adapter_name)
        yield "down", down
        if (magnitude := layers.magnitude(layer, adapter_name)) is not None:
            yield "magnitude", magnitude
        yield "up", up

    def as_used(self, model: nn.Module, adapter_names: list[str]) -> AbstractContextManager[None]:
        """A block in which the factors of adapters of this type are, as plain LoRA, what the layers compute now."""
        return nullcontext()

    def plain(self, config: Any) -> Any:
        """The config of the plain LoRA that such factors are."""
        return config
