"""The base class of the configs of all adapter types.

The configs are `LoraConfig`s that need no target_modules, since they know which modules kohya's LoRA types adapt. Their
PEFT type is LORA, and stock PEFT can read their `to_dict` and `adapter_config.json`: other options than LoRA's are
stored in `auto_mapping`, a free-form field, from which `registry.restored` restores the type.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from peft import LoraConfig

from lora_adapters.convert.errors import AdapterError
from lora_adapters.module_patterns import check_patterns
from lora_adapters.presets import Preset, find_preset

DEFAULT_CONV_DIM = 4
FACTS = "lora_adapters"  # the key in auto_mapping
_DECIDED = ("target_modules", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "resolved")  # filled in by a model
# Options for variants of LoRA layers that older releases of PEFT do not mark as such in their configs.
_UNMARKED_VARIANTS = ("use_dora", "use_qalora", "alora_invocation_tokens", "arrow_config")


def check(condition: bool, message: str) -> None:
    """Raise AdapterError with the message unless the condition holds."""
    if not condition:
        raise AdapterError(message)


@dataclass
class AdapterConfig(LoraConfig):
    """The options of all adapter types: kohya's target modules, and ranks and alphas for each block.

    It is a `LoraConfig` that needs no target_modules. When the adapter is added to a model, target_modules and the
    ranks and alphas of all modules are filled in.
    """

    covers_conv: ClassVar[bool] = False
    _before: ClassVar[tuple[dict[str, Any], dict[str, Any]] | None] = None

    r: int = field(default=4, metadata={"help": "Rank."})
    lora_alpha: float = field(default=1, metadata={"help": "Alpha: the change of weight is alpha/rank · up · down."})  # type: ignore[assignment]
    conv_dim: int | None = field(default=None, metadata={"help": "Rank of convolutions larger than 1x1."})
    conv_alpha: float | None = field(
        default=None,
        metadata={"help": "Alpha of convolutions larger than 1x1; None: 1, or lora_alpha if their rank is r."},
    )
    block_dims: list[int] | None = field(
        default=None, metadata={"help": "Rank in each of the 25 blocks of the U-Net (SDXL: 23); 0 skips a block."}
    )
    block_alphas: list[float] | None = field(default=None, metadata={"help": "Alpha in each block."})
    conv_block_dims: list[int] | None = field(default=None, metadata={"help": "The same as block_dims, for conv_dim."})
    conv_block_alphas: list[float] | None = field(
        default=None, metadata={"help": "The same as block_alphas, for conv_alpha."}
    )
    preset: str | None = field(
        default=None,
        metadata={"help": "Target modules: a preset of lora_adapters.presets, or a file; None: as in kohya's trainer."},
    )
    include_patterns: list[str] | None = field(
        default=None,
        metadata={"help": "Regular expressions: exceptions to exclude_patterns, or the only modules to adapt."},
    )
    exclude_patterns: list[str] | None = field(
        default=None, metadata={"help": "Regular expressions of modules not to adapt."}
    )
    reg_dims: dict[str, int] | None = field(
        default=None, metadata={"help": "Rank by regular expression (the first match applies); 0 skips a module."}
    )
    reg_alphas: dict[str, float] | None = field(
        default=None, metadata={"help": "Alpha by pattern of reg_dims; default: lora_alpha."}
    )
    resolved: bool = field(
        default=False, metadata={"help": "Set when added to a model: rank_pattern and alpha_pattern are complete."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.r >= 1, f"r is {self.r}: a rank is at least 1")
        check(self.conv_dim is None or self.conv_dim >= 1, f"conv_dim is {self.conv_dim}: a rank is at least 1")
        for name in ("block_dims", "conv_block_dims"):
            for value in getattr(self, name) or ():
                check(
                    isinstance(value, int) and value >= 0,
                    f"{name} has the value {value}: ranks are integers of at least 0 (0 skips a block)",
                )
        for name in ("include_patterns", "exclude_patterns", "reg_dims", "reg_alphas"):
            check_patterns(name, getattr(self, name))
        for pattern, rank in (self.reg_dims or {}).items():
            check(
                isinstance(rank, int) and rank >= 0,
                f"reg_dims {pattern}={rank}: ranks are integers of at least 0 (0 skips a module)",
            )
        if self.preset is not None and not self.resolved:  # for a resolved config, the preset's file may not exist
            self.check_preset(find_preset(self.preset))
        self.check_options()

    def check_preset(self, preset: Preset) -> None:
        """Raise AdapterError for a preset that this type does not support."""
        check(
            not preset.overrides,
            f"preset {self.preset} has options for single modules, which {type(self).__name__} does not support",
        )

    def check_options(self) -> None:
        """Raise AdapterError for options of `LoraConfig` that this type does not support."""
        check(
            not self.target_parameters,
            f"target_parameters: {type(self).__name__} is for linear layers and convolutions; use peft.LoraConfig",
        )

    def for_model(self) -> "AdapterConfig":
        """The config for a model: this one, or a copy of the original config if another model already uses it."""
        if self._before is None:
            return self
        asked, decided = self._before
        fresh = copy.copy(self)
        fresh._before = None  # type: ignore[misc]
        for name, value in asked.items():
            if getattr(self, name) == decided[name]:  # otherwise the user has changed it since
                setattr(fresh, name, copy.deepcopy(value))
        return fresh

    def asked(self) -> dict[str, Any]:
        """The current values of the fields that a model fills in."""
        return {name: copy.deepcopy(getattr(self, name)) for name in _DECIDED}

    def decide(self, decided: Mapping[str, Any], asked: dict[str, Any] | None = None) -> None:
        """Fill in fields decided by a model; `asked` is the earlier result of `asked()`, None to keep the known one."""
        if asked is None:
            asked = self._before[0] if self._before is not None else self.asked()
        for name, value in decided.items():
            setattr(self, name, set(value) if name == "target_modules" else value)
        self.resolved = True
        self._before = asked, self.asked()  # type: ignore[misc]

    def undecide(self, asked: Mapping[str, Any]) -> None:
        """Restore the config after a model could not be adapted."""
        for name, value in asked.items():
            setattr(self, name, value)
        self._before = None  # type: ignore[misc]

    @property
    def conv(self) -> bool:
        """Whether convolutions larger than 1x1, and all other layers of ResNet blocks, are adapted."""
        return self.covers_conv or self.conv_dim is not None or self.conv_block_dims is not None

    def facts(self) -> dict[str, Any]:
        """The type and its own fields, as stored in `auto_mapping`."""
        return {
            "type": type(self).__name__.removesuffix("Config"),
            **{name: getattr(self, name) for name in fields_beyond(type(self), LoraConfig)},
        }

    def to_dict(self) -> dict[str, Any]:
        """The config of the equivalent plain LoRA, with the type's own facts in `auto_mapping`."""
        own = fields_beyond(type(self), LoraConfig)
        plain = {key: value for key, value in super().to_dict().items() if key not in own}
        return {**plain, "auto_mapping": {**(self.auto_mapping or {}), FACTS: self.facts()}}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json, with both PEFT's `auto_mapping` entries and this type's facts."""
        if kwargs.get("auto_mapping_dict") is not None:
            kwargs["auto_mapping_dict"] = {**kwargs["auto_mapping_dict"], FACTS: self.facts()}
        super().save_pretrained(save_directory, **kwargs)


def variants(config: LoraConfig) -> list[str]:
    """The options of the config that select one of PEFT's LoRA variants."""
    known = {field.name: field.metadata for field in fields(LoraConfig)}
    marked = [name for name, facts in known.items() if facts.get("is_lora_variant") or name in _UNMARKED_VARIANTS]
    active = [name for name in marked if getattr(config, name)]
    if config.init_lora_weights in known["init_lora_weights"].get("lora_variants", ()):
        active.append(f"init_lora_weights={config.init_lora_weights!r}")
    return active


def fields_beyond(config: type, other: type) -> list[str]:
    """The names of the fields of a config class that another class does not have."""
    known = {field.name for field in fields(other)}
    return [field.name for field in fields(config) if field.name not in known]
