"""PEFT configs of LoRA-LierLa, LoRA-C3Lier and DyLoRA.

They are `LoraConfig`s that need no target_modules, since they know which modules kohya's LoRA types adapt. Their
PEFT type is LORA, and `to_dict` and `adapter_config.json` hold nothing that stock PEFT does not know: what is beyond
LoRA stands in `auto_mapping`, a free-form field, from which this package restores the type.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from peft import LoraConfig

from lora_adapters.convert.deltas.low_rank import RANK_SAMPLINGS, RANK_SCALINGS
from lora_adapters.convert.errors import AdapterError
from lora_adapters.convert.formats.metadata import DYLORA_FACTS, DyLora

FACTS = "lora_adapters"  # the key in auto_mapping
_DECIDED = ("target_modules", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "resolved")  # filled in by a model
# Variants of a LoRA layer that older releases of PEFT do not mark as such in their configs.
_UNMARKED_VARIANTS = ("use_dora", "use_qalora", "alora_invocation_tokens", "arrow_config")


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise AdapterError(message)


@dataclass
class LierLaConfig(LoraConfig):
    """LoRA of the linear layers and 1x1 convolutions of attention blocks and CLIP text encoders (kohya's default).

    r is the rank (kohya's network_dim), lora_alpha the alpha. With target_modules given, it acts on any model as
    `LoraConfig` does. rank_pattern and alpha_pattern win over every other rank and alpha. AdapterError for values that
    make no sense.

    As with `LoraConfig`, the model keeps the config that it is given, and fills in what it has decided: target_modules
    and the ranks and alphas of all modules. One config may be used for several models: those after the first get a copy
    of it as it was asked for. Source: LoRA (arXiv:2106.09685), with the coverage of kohya's trainer.

    >>> from diffusers import UNet2DConditionModel
    >>> unet = UNet2DConditionModel(
    ...     block_out_channels=(32, 64),
    ...     down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    ...     up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ...     cross_attention_dim=32,
    ... )
    >>> unet.add_adapter(LierLaConfig(r=8, lora_alpha=4), adapter_name="mine")
    >>> sorted({path.split(".")[0] for path in unet.peft_config["mine"].target_modules})
    ['down_blocks', 'mid_block', 'up_blocks']
    """

    covers_conv: ClassVar[bool] = False
    _before: ClassVar[tuple[dict[str, Any], dict[str, Any]] | None] = None

    r: int = field(default=4, metadata={"help": "Rank."})
    lora_alpha: float = field(default=1, metadata={"help": "Alpha: the change of weight is alpha/rank · up · down."})  # type: ignore[assignment]
    conv_dim: int | None = field(default=None, metadata={"help": "Rank of convolutions larger than 1x1."})
    conv_alpha: float | None = field(
        default=None,
        metadata={"help": "Alpha of convolutions larger than 1x1; None: 1, or lora_alpha where their rank is r."},
    )
    block_dims: list[int] | None = field(
        default=None, metadata={"help": "Rank in each of the 25 blocks of the U-Net (SDXL: 23); 0 skips a block."}
    )
    block_alphas: list[float] | None = field(default=None, metadata={"help": "Alpha in each block."})
    conv_block_dims: list[int] | None = field(default=None, metadata={"help": "As block_dims, for conv_dim."})
    conv_block_alphas: list[float] | None = field(default=None, metadata={"help": "As block_alphas, for conv_alpha."})
    resolved: bool = field(
        default=False, metadata={"help": "Set once it is in a model: every rank and alpha stands in the patterns."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self.r >= 1, f"r is {self.r}: a rank is at least 1")
        _check(self.conv_dim is None or self.conv_dim >= 1, f"conv_dim is {self.conv_dim}: a rank is at least 1")
        for name in ("block_dims", "conv_block_dims"):
            for value in getattr(self, name) or ():
                _check(isinstance(value, int) and value >= 0, f"{name} has the value {value}: ranks are whole, 0 skips")
        self.check_options()

    def check_options(self) -> None:
        """AdapterError for options of `LoraConfig` that adapters of this type cannot have."""
        _check(
            not self.target_parameters,
            f"target_parameters: {type(self).__name__} is for linear layers and convolutions; take peft.LoraConfig",
        )

    def for_model(self) -> "LierLaConfig":
        """The config to put into a model: this one, or a copy as it was asked for where a model has it already."""
        if self._before is None:
            return self
        asked, decided = self._before
        fresh = copy.copy(self)
        fresh._before = None  # type: ignore[misc]
        for name, value in asked.items():
            if getattr(self, name) == decided[name]:  # else it has been set to something else since
                setattr(fresh, name, copy.deepcopy(value))
        return fresh

    def asked(self) -> dict[str, Any]:
        """The fields that a model fills in, as they are now."""
        return {name: copy.deepcopy(getattr(self, name)) for name in _DECIDED}

    def decide(self, decided: Mapping[str, Any], asked: dict[str, Any] | None = None) -> None:
        """Fill in what a model has decided; `asked` is what `asked()` gave before, None where it is known already."""
        if asked is None:
            asked = self._before[0] if self._before is not None else self.asked()
        for name, value in decided.items():
            setattr(self, name, set(value) if name == "target_modules" else value)
        self.resolved = True
        self._before = asked, self.asked()  # type: ignore[misc]

    def undecide(self, asked: Mapping[str, Any]) -> None:
        """Make it what it was before a model that could not take it."""
        for name, value in asked.items():
            setattr(self, name, value)
        self._before = None  # type: ignore[misc]

    @property
    def conv(self) -> bool:
        """Whether convolutions larger than 1x1, and everything else in ResNet blocks, are covered."""
        return self.covers_conv or self.conv_dim is not None or self.conv_block_dims is not None

    def facts(self) -> dict[str, Any]:
        """The type and its own fields, as they stand in `auto_mapping`."""
        return {
            "type": type(self).__name__.removesuffix("Config"),
            **{name: getattr(self, name) for name in _own(self)},
        }

    def to_dict(self) -> dict[str, Any]:
        """The equal plain LoRA's config, with the type's own facts in `auto_mapping`."""
        plain = {key: value for key, value in super().to_dict().items() if key not in _own(self)}
        return {**plain, "auto_mapping": {**(self.auto_mapping or {}), FACTS: self.facts()}}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json; PEFT's own `auto_mapping` entries and this type's facts both go into it."""
        if kwargs.get("auto_mapping_dict") is not None:
            kwargs["auto_mapping_dict"] = {**kwargs["auto_mapping_dict"], FACTS: self.facts()}
        super().save_pretrained(save_directory, **kwargs)


@dataclass
class C3LierConfig(LierLaConfig):
    """LierLa and everything in ResNet blocks, downsamplers and upsamplers of the U-Net.

    Convolutions larger than 1x1 have rank conv_dim and alpha conv_alpha; the ResNets' linear layers and 1x1
    convolutions have r and lora_alpha, as in kohya's trainer. A C3LierConfig whose conv_dim is None covers the same
    modules, the larger convolutions at r.
    """

    covers_conv: ClassVar[bool] = True

    conv_dim: int | None = field(default=4, metadata={"help": "Rank of convolutions larger than 1x1."})


@dataclass
class DyLoraConfig(LierLaConfig):
    """DyLoRA (arXiv:2210.07558): one training whose first b components are a good adapter of rank b, for every b.

    In each training step a b, a multiple of `unit`, is drawn for each sample of the batch, the same in the whole model,
    and only the first b components take part. Covers what LierLa does, or what C3Lier does where conv_dim (or
    conv_block_dims) is given. A module whose rank is below b takes part in full.

    rank_sampling "spread" needs the samples of a batch in the first dimension of what every layer reads, as it is in
    U-Nets and text encoders; "uniform" draws one b for all samples, as the paper does, and needs nothing. freeze_lower
    draws one b for all samples too.
    """

    unit: int = field(default=1, metadata={"help": "Ranks are trained in steps of this; it divides r and conv_dim."})
    rank_scaling: str = field(
        default=DyLora.rank_scaling,
        metadata={"help": "Scale at rank b: constant is alpha/r, rank is alpha/b (the paper's), sqrt is between."},
    )
    freeze_lower: bool = field(
        default=False, metadata={"help": "Train only the last `unit` of the b components in a step."}
    )
    rank_sampling: str = field(
        default=DyLora.rank_sampling,
        metadata={"help": "How b is drawn: uniform, one a step; spread, one a sample, low ranks and r more often."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self.unit >= 1, f"unit is {self.unit}: it is at least 1")
        for name in ("r", "conv_dim"):
            rank = getattr(self, name)
            _check(rank is None or rank % self.unit == 0, f"unit {self.unit} does not divide {name} {rank}")
        for name, known in (("rank_scaling", RANK_SCALINGS), ("rank_sampling", RANK_SAMPLINGS)):
            value = getattr(self, name)
            _check(value in known, f"{name} is {value!r}: it is one of {', '.join(known)}")

    def check_options(self) -> None:
        """As for LierLa; and AdapterError for whatever computes a LoRA's layers in another way than DyLoRA does."""
        super().check_options()
        _check(not self.use_dora, "use_dora: a DyLoRA has no magnitudes that would be right at every rank")
        _check(not self.lora_bias, "lora_bias: a DyLoRA has no biases that would be right at every rank")
        for option in _variants(self):
            _check(False, f"{option}: it computes the layers in its own way, as a DyLoRA does; take one of the two")

    @property
    def dylora(self) -> DyLora:
        """Its facts as they stand in kohya's metadata."""
        return DyLora(**{name: getattr(self, name) for name in DYLORA_FACTS})


_TYPES = {"LierLa": LierLaConfig, "C3Lier": C3LierConfig, "DyLora": DyLoraConfig}


def _variants(config: LoraConfig) -> list[str]:
    """The options of the config by which PEFT computes a layer in another way than plain LoRA (its LoRA variants)."""
    known = {one.name: one.metadata for one in fields(LoraConfig)}
    marked = [name for name, facts in known.items() if facts.get("is_lora_variant") or name in _UNMARKED_VARIANTS]
    found = [name for name in marked if getattr(config, name)]
    if config.init_lora_weights in known["init_lora_weights"].get("lora_variants", ()):
        found.append(f"init_lora_weights={config.init_lora_weights!r}")
    return found


def _own(config: LierLaConfig) -> list[str]:
    """Names of the fields that LoraConfig does not have."""
    plain = {one.name for one in fields(LoraConfig)}
    return [one.name for one in fields(config) if one.name not in plain]


def restored(config: LoraConfig) -> LoraConfig:
    """The config as its own type, where `auto_mapping` says that it is one of this package's; else as it is."""
    facts = dict((config.auto_mapping or {}).get(FACTS) or {})
    cls = _TYPES.get(facts.pop("type", ""))
    if cls is None or isinstance(config, LierLaConfig):
        return config
    plain = {one.name: getattr(config, one.name) for one in fields(LoraConfig) if one.init}
    own = {name: value for name, value in facts.items() if name in {one.name for one in fields(cls)}}
    return cls(**{**plain, **own})


def as_plain(config: DyLoraConfig) -> LierLaConfig:
    """The same without what makes it a DyLoRA."""
    kept = {one.name: getattr(config, one.name) for one in fields(LierLaConfig) if one.init}
    return LierLaConfig(**kept)
