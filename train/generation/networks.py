"""The adapters for image generation: read and checked before the base model is loaded, then applied to it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_adapters.adapter import Adapter
from lora_adapters.convert.adapter import Adapter as AdapterData
from lora_adapters.convert.deltas.low_rank import RANK_SCALINGS
from lora_adapters.convert.errors import AdapterError
from lora_adapters.convert.formats.metadata import DyLora
from lora_adapters.convert.tools.model_arguments import read_arguments
from lora_adapters.kohya_options import MODULES
from lora_adapters.train.errors import OptionError, TrainingError
from lora_adapters.train.generation.options import GenerateSettings
from lora_adapters.train.models.base import BaseModels
from lora_adapters.train.models.merging import Placed, match_to_model, merge_weights, original
from lora_adapters.train.options.values import key_values
from lora_adapters.types.dylora.rank_controller import set_rank


@dataclass(frozen=True)
class Network:
    """An adapter with its options. rank: the default rank of a DyLoRA; None is its full rank."""

    source: str
    adapter: Adapter
    multiplier: float
    rank: int | None
    merged: bool

    @property
    def name(self) -> str:
        """The name of the file without its suffix, or of the folder or repository."""
        path = Path(self.source)
        return path.stem if path.suffix in (".safetensors", ".ckpt", ".pt", ".pth", ".bin") else path.name

    def at(self, rank: int | None) -> AdapterData:
        """The adapter truncated to `rank` (None: its default rank). TrainingError if a DyLoRA lacks this rank."""
        rank = self.rank if rank is None else rank
        if rank is None or self.adapter.dylora is None:
            return self.adapter
        try:
            return self.adapter.truncate(rank)
        except AdapterError as error:
            raise TrainingError(f"{self.source}: {error}") from None


def networks(settings: GenerateSettings) -> list[Network]:
    """Read the adapters of --network_weights. TrainingError or AdapterError if they or their options are invalid."""
    arguments = read_arguments(settings.network_weights or [])
    if not arguments:
        _refuse_without_weights(settings)
        return []
    count = len(arguments)
    modules = settings.network_module or ["networks.lora"]
    modules = modules * count if len(modules) == 1 else modules
    if len(modules) != count:
        raise OptionError(
            f"--network_module has {len(modules)} values for {count} --network_weights: give 1 or {count}"
        )
    for name in ("network_mul", "network_args"):
        if len(getattr(settings, name) or []) > count:
            raise OptionError(f"--{name} has {len(getattr(settings, name))} values for {count} --network_weights")
    multipliers = settings.network_mul or []
    twice = next((argument.source for argument in arguments[: len(multipliers)] if argument.unet is not None), None)
    if twice is not None:
        raise OptionError(f"{twice} has two weights, one after its name and one in --network_mul: give only one")
    args = [*(settings.network_args or []), *[""] * count][:count]
    first_n = settings.network_merge_n_models or 0
    if not 0 <= first_n <= count:
        raise OptionError(f"--network_merge_n_models {first_n}: only {count} --network_weights are given")
    merged = count if settings.network_merge else first_n
    adapters = []
    for number, (argument, module, text) in enumerate(zip(arguments, modules, args, strict=True)):
        source = argument.source
        adapter, rank = _typed(Adapter.load(source), source, module, text)
        adapter, multiplier = argument.applied(adapter)
        multiplier = multipliers[number] if number < len(multipliers) else multiplier
        own = rank if rank is not None else settings.rank if adapter.dylora is not None else None
        adapters.append(Network(source, adapter, multiplier, own, number < merged))
        adapters[-1].at(None)  # checks the rank
    if settings.rank is not None and not any(network.adapter.dylora for network in adapters):
        raise TrainingError(f"--rank {settings.rank} is for DyLoRA, and none of --network_weights is a DyLoRA")
    return adapters


def _refuse_without_weights(settings: GenerateSettings) -> None:
    names = "network_module network_mul network_args network_merge network_merge_n_models network_pre_calc"
    for name in (*names.split(), "network_show_meta", "rank"):
        if getattr(settings, name) not in (None, False, []):
            raise OptionError(f"--{name} needs --network_weights")


def _typed(adapter: Adapter, source: str, module: str, text: str) -> tuple[Adapter, int | None]:
    """(adapter, rank in --network_args). --network_module can declare an adapter as DyLoRA if its file does not."""
    kind = MODULES.get(module)
    if kind is None:
        raise OptionError(f"--network_module {module} is not supported; supported are {', '.join(MODULES)}")
    args = key_values([part for part in text.split(";") if part.strip()], "network_args")
    # A DyLoRA file without this metadata is kohya's, whose script for splitting keeps alpha.
    dylora = adapter.dylora or (DyLora(rank_scaling="rank") if kind == "DyLora" else None)
    for key in args:
        if dylora is None or key not in ("rank", "unit", "rank_scaling"):
            rule = "a DyLoRA takes rank=, unit= and rank_scaling=, other adapters take no arguments"
            raise OptionError(f"--network_args {key}={args[key]} for {source}: {rule}")
    if dylora is None:
        return adapter, None
    numbers = {key: args[key] for key in ("rank", "unit") if key in args}
    for key, value in numbers.items():
        if not value.isdecimal() or int(value) < 1:
            raise OptionError(f"--network_args {key}={value} for {source}: give 1 or more")
    scaling = args.get("rank_scaling", dylora.rank_scaling)
    if scaling not in RANK_SCALINGS:
        raise OptionError(f"--network_args rank_scaling={scaling}: not one of {', '.join(RANK_SCALINGS)}")
    dylora = replace(dylora, unit=int(numbers.get("unit", dylora.unit)), rank_scaling=scaling)
    return adapter.as_dylora(dylora), int(numbers["rank"]) if "rank" in numbers else None


def metadata(networks: Sequence[Network]) -> str:
    """The text that --network_show_meta prints."""
    return "\n".join(
        f"{network.source}: {json.dumps(dict(network.adapter.metadata), indent=2)}" for network in networks
    )


class LiveNetworks:
    """Adapters as layers of the pipeline. Multipliers and ranks change without touching the model's own weights."""

    def __init__(self, pipe: Any, networks: Sequence[Network]):
        self._pipe, self._networks = pipe, networks
        self._names = [f"network_{number}" for number in range(len(networks))]
        for name, network in zip(self._names, networks, strict=True):
            try:
                network.adapter.to_pipeline(pipe, name)
            except AdapterError as error:
                raise AdapterError(f"{network.source}: {error}") from None

    def follow(self, networks: Sequence[Network]) -> None:
        """Use the ranks of these networks, which must be the same adapters."""
        self._networks = networks

    def use(self, multipliers: Sequence[float], rank: int | None) -> None:
        """Set the multipliers, and the rank of the DyLoRAs (None: their default ranks)."""
        if not self._networks:
            return
        self._pipe.set_adapters(self._names, list(multipliers))
        for name, network in zip(self._names, self._networks, strict=True):
            if network.adapter.dylora is not None:
                full = max(module.rank for module in network.adapter.pairs().values())
                set_rank(self._pipe, next(r for r in (rank, network.rank, full) if r is not None), name)


class MergedNetworks:
    """Adapters that are merged into the weights for each setting, starting from a copy of the original weights."""

    def __init__(self, models: BaseModels, networks: Sequence[Network]):
        self._networks = networks
        self._models = models
        self._originals: dict[Any, Any] = {}
        for network in networks:
            self._originals |= {layer: original(layer) for layer, _ in _placed(models, network, None)}
        self._now: tuple[tuple[float, ...], int | None] | None = None

    def use(self, multipliers: Sequence[float], rank: int | None) -> None:
        """Set the multipliers and the rank; see `LiveNetworks.use`."""
        if self._now == (tuple(multipliers), rank):
            return
        parts = [_placed(self._models, network, rank) for network in self._networks]
        merge_weights([*zip(parts, multipliers, strict=True)], self._originals)
        self._now = (tuple(multipliers), rank)


def _placed(models: BaseModels, network: Network, rank: int | None) -> Placed:
    try:
        return match_to_model(models, network.at(rank))
    except AdapterError as error:
        raise AdapterError(f"{network.source}: {error}") from None


def apply_networks(
    models: BaseModels, pipe: Any, networks: Sequence[Network], pre_calc: bool
) -> LiveNetworks | MergedNetworks:
    """Merge the adapters with `merged`, and return the object that sets the multipliers of the others."""
    merge_weights([(_placed(models, network, None), network.multiplier) for network in networks if network.merged])
    live = unmerged(networks)
    return MergedNetworks(models, live) if pre_calc else LiveNetworks(pipe, live)


def unmerged(networks: Sequence[Network]) -> list[Network]:
    """The adapters that are not merged, whose multipliers and ranks can be changed."""
    return [network for network in networks if not network.merged]
