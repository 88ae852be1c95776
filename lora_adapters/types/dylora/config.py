"""DyLoRA: one training run gives adapters of every rank."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar

from torch import nn

from lora_adapters.convert.deltas.low_rank import RANK_SAMPLINGS, RANK_SCALINGS, LowRank
from lora_adapters.convert.deltas.svd import by_size
from lora_adapters.convert.formats.diffusers import lora_config
from lora_adapters.convert.formats.metadata import (
    DYLORA_FACTS,
    DyLora,
    dylora_metadata,
    dylora_of,
    network_args,
)
from lora_adapters.convert.parsing import number
from lora_adapters.types import layers
from lora_adapters.types.adapter_type import AdapterType, NetworkArg, flag
from lora_adapters.types.base import check, variants
from lora_adapters.types.lierla.config import LierLaConfig

from . import rank_controller
from .layer import DyLoraVariant

SORTED_SCALING = "constant"  # with this scaling, the first sorted components are the best adapter of their rank
# The results of the rank study: the share of the steps, and the power of the components' learning rates.
SORT_AT, RATE_POWER = "0.3", "0.25"


@dataclass
class DyLoraConfig(LierLaConfig):
    """DyLoRA (arXiv:2210.07558): one adapter whose first b components are a good adapter of rank b, for every b.

    In each training step, a rank b (a multiple of `unit`) is sampled for each sample of the batch. It is the same in
    the whole model, and only the first b components are used. A module whose rank is below b is used in full. The
    target modules are those of LierLa, or those of C3Lier if conv_dim or conv_block_dims is given.

    rank_sampling "spread" requires that the first dimension of every layer's input is that of the samples, as in U-Nets
    and text encoders. "uniform" samples one b for the whole batch, as in the paper, and has no such requirement.
    freeze_lower also samples one b for the whole batch.

    If sort_at is above 0, training begins at the full rank. After that share of the steps the components are sorted by
    size (see `sort_components`), and ranks are sampled from then on. If the number of steps is given
    (`set_step(..., total_steps=N)`), `set_step` returns whether to sort now; the training program does this itself.
    With rate_power, the first components learn faster than the last ones: see `scale_component_rates`.
    """

    unit: int = field(default=1, metadata={"help": "Step between the trained ranks; must divide r and conv_dim."})
    rank_scaling: str | None = field(
        default=None,
        metadata={
            "help": "Scale at rank b: alpha/r (constant), alpha/b as in the paper (rank), or in between (sqrt). "
            "None: constant with sort_at, otherwise sqrt."
        },
    )
    freeze_lower: bool = field(
        default=False, metadata={"help": "Train only the last `unit` of the b components in a step."}
    )
    rank_sampling: str = field(
        default=DyLora.rank_sampling,
        metadata={
            "help": "How b is sampled: once per step (uniform), or per sample, low ranks and r more often (spread)."
        },
    )

    sort_at: float = field(
        default=0.0,
        metadata={"help": "Share of the steps that train only the full rank; after them, components are sorted."},
    )

    rate_power: float = field(
        default=0.0,
        metadata={"help": "Component k has (4/k)**rate_power times the learning rate; requires sort_at."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank_scaling is None:
            self.rank_scaling = SORTED_SCALING if self.sort_at else DyLora.rank_scaling
        check(0 <= self.sort_at < 1, f"sort_at is {self.sort_at}: it must be a share of the steps, from 0 to below 1")
        check(
            not self.sort_at or self.rank_scaling == SORTED_SCALING,
            f"sort_at needs rank_scaling {SORTED_SCALING}, not {self.rank_scaling}; use that, or sort_at=0",
        )
        check(
            0 <= self.rate_power <= 1,
            f"rate_power is {self.rate_power}: it must be from 0 (the same rate for all components) to 1",
        )
        check(
            not self.rate_power or self.sort_at > 0,
            f"rate_power {self.rate_power} requires sort_at: give sort_at, or use rate_power=0",
        )
        check(self.unit >= 1, f"unit is {self.unit}: it must be at least 1")
        for name in ("r", "conv_dim"):
            rank = getattr(self, name)
            check(rank is None or rank % self.unit == 0, f"unit {self.unit} does not divide {name} {rank}")
        for name, known in (("rank_scaling", RANK_SCALINGS), ("rank_sampling", RANK_SAMPLINGS)):
            value = getattr(self, name)
            check(value in known, f"{name} is {value!r}: it must be one of {', '.join(known)}")

    def check_options(self) -> None:
        """The checks of LierLa; also AdapterError for PEFT's LoRA variants, which cannot be combined with DyLoRA."""
        super().check_options()
        check(not self.use_dora, "use_dora is not supported: no magnitudes of a DyLoRA would be right at every rank")
        check(not self.lora_bias, "lora_bias is not supported: no biases of a DyLoRA would be right at every rank")
        for option in variants(self):
            check(False, f"{option} cannot be combined with DyLoRA, since both replace the forward pass of layers")

    @property
    def dylora(self) -> DyLora:
        """The DyLoRA options as kohya's metadata record them."""
        return DyLora(**{name: getattr(self, name) for name in DYLORA_FACTS})


class DyLoraType(AdapterType):
    """LoRA whose components are gated by a rank controller."""

    name, title, config = "DyLora", "DyLoRA", DyLoraConfig
    network_modules = ("networks.dylora", "network.dylora", "dylora")
    network_args: ClassVar = {
        "unit": NetworkArg(int, "a whole number"),
        "rank_scaling": NetworkArg(str, "a name"),
        "rank_sampling": NetworkArg(str, "a name"),
        "freeze_lower": NetworkArg(flag, "True or False"),
        "sort_at": NetworkArg(number, "a number"),
        "rate_power": NetworkArg(number, "a number"),
    }
    variant = DyLoraVariant

    def training_args(self, args: Mapping[str, str]) -> dict[str, str]:
        """Add the study's sort_at and rate_power, unless a rank_scaling that does not allow sorting is given."""
        if args.get("rank_scaling", SORTED_SCALING) != SORTED_SCALING:
            return dict(args)
        sort_at = args.get("sort_at", SORT_AT)
        try:
            sorts = float(sort_at) > 0
        except ValueError:  # reported later, with the other arguments
            sorts = False
        return {"sort_at": SORT_AT, **({"rate_power": RATE_POWER} if sorts else {}), **args}

    def facts_of(self, metadata: Mapping[str, str]) -> dict[str, Any] | None:
        """The options of a DyLoRA from the metadata of a file.

        Args:
            metadata: kohya's metadata.

        Returns:
            unit, rank_scaling, freeze_lower and rank_sampling; None for another type. sort_at and rate_power are not
            included, since the training is over, except as 0 for a file that cannot be sorted (another scaling).
        """
        dylora = dylora_of(metadata)
        if dylora is None:
            return None
        unsortable = dylora.rank_scaling != SORTED_SCALING
        return {**asdict(dylora), **({"sort_at": 0.0, "rate_power": 0.0} if unsortable else {})}

    def metadata(self, config: Any, metadata: Mapping[str, str]) -> dict[str, str]:
        """ss_network_module and ss_network_args; other network args are kept."""
        of_training = {name: str(getattr(config, name)) for name in ("sort_at", "rate_power") if getattr(config, name)}
        return dylora_metadata(config.dylora, {**network_args(metadata), **of_training})

    def config_options(self, modules: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
        """As for LoRA, with an r that unit divides: the unit of a file need not divide its ranks."""
        highest = max(module.rank for module in modules.values())
        unit = facts["unit"] if highest % facts["unit"] == 0 else 1
        rank = lora_config(modules)["r"]
        options = lora_config(modules, rank=rank if rank % unit == 0 else highest)
        return {**options, "facts": {**facts, "unit": unit}}

    def attach(self, model: nn.Module, adapter_name: str, config: Any) -> None:
        """Make the model sample ranks at each call in training; see `rank_controller.attach`."""
        rank_controller.attach(model, adapter_name, config.dylora, config.sort_at, config.rate_power)

    def detach(self, model: nn.Module, adapter_name: str) -> None:
        """See `rank_controller.detach`."""
        rank_controller.detach(model, adapter_name)

    def refit(self, model: nn.Module) -> None:
        """See `rank_controller.refit`."""
        rank_controller.refit(model)

    def delta(self, layer: Any, adapter_name: str, stabilized: bool = False) -> LowRank:
        """As for LoRA; sorted if training has not reached the sorting step, so that it can be truncated."""
        pair = layers.low_rank(layer, adapter_name, stabilized)
        return by_size(pair).to(pair.up.dtype) if layer.lora_variant[adapter_name].controller.unsorted else pair

    def as_used(self, model: nn.Module, adapter_names: list[str]) -> AbstractContextManager[None]:
        """A context in which components above the current rank are zero."""
        return rank_controller.cut_to_rank(model, adapter_names)

    def plain(self, config: Any) -> LierLaConfig:
        """The same config without the DyLoRA options."""
        kept = {part.name: getattr(config, part.name) for part in fields(LierLaConfig) if part.init}
        return LierLaConfig(**kept)


TYPE = DyLoraType()
