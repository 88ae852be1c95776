"""Converts kohya's --network_module, --network_dim, --network_alpha and --network_args to a config."""

import ast
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lora_adapters.convert.errors import AdapterError
from lora_adapters.convert.families.names import nearest
from lora_adapters.convert.parsing import number
from lora_adapters.types.adapter_type import AdapterType, NetworkArg, flag
from lora_adapters.types.base import DEFAULT_CONV_DIM, AdapterConfig
from lora_adapters.types.registry import type_named, types

from .block_lr import block_lr_weights, without_zero_blocks
from .module_patterns import check_patterns
from .target_modules import check_block_list

logger = logging.getLogger(__name__)
# The name of the type in files, by --network_module.
MODULES = {name: kind.name for kind in types() for name in kind.network_modules}
# What to use instead of network modules that are not supported.
_INSTEAD = {
    "networks.lora_fa": "LoRA-FA, which trains only `up`, is not supported; give networks.lora, which trains both "
    "factors and writes the same kind of file",
    "networks.oft": "kohya's OFT is not supported; give lycoris.kohya with algo=diag-oft in network_args",
}


@dataclass(frozen=True)
class NetworkOptions:
    """kohya's network options, parsed: the config of the layers, learning rates and dropouts."""

    config: AdapterConfig
    block_lr_weights: list[float] | None = None
    loraplus_lr_ratio: float | None = None
    loraplus_unet_lr_ratio: float | None = None
    loraplus_text_encoder_lr_ratio: float | None = None
    dropout: float | None = None
    rank_dropout: float | None = None
    module_dropout: float | None = None
    reg_lrs: dict[str, float] | None = None
    verbose: bool = False


def _list(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    return lambda text: [kind(item.strip()) for item in text.split(",")]


def _patterns(text: str) -> list[str]:
    """Parse `["a.*", r"b"]` as in kohya's trainer; any other text is a single pattern. ValueError for other lists."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    patterns = value if isinstance(value, list) else [value]
    if not all(isinstance(pattern, str) and pattern for pattern in patterns):
        raise ValueError(text)
    return patterns


def _by_pattern(kind: Callable[[str], Any]) -> Callable[[str], dict[str, Any]]:
    """A parser of `pattern=value,pattern=value` as in kohya's trainer; patterns cannot contain commas."""

    def parse(text: str) -> dict[str, Any]:
        values = {}
        for item in filter(None, (item.strip() for item in text.split(","))):
            pattern, equals, number = item.rpartition("=")  # the last "=", since patterns can contain (?=...)
            if not equals:
                raise ValueError(item)
            values[pattern.strip()] = kind(number.strip())
        return values

    return parse


_COMMON = {
    "conv_dim": NetworkArg(int, "a whole number"),
    "conv_alpha": NetworkArg(number, "a number"),
    "block_dims": NetworkArg(_list(int), "whole numbers with commas between them"),
    "block_alphas": NetworkArg(_list(number), "numbers with commas between them"),
    "conv_block_dims": NetworkArg(_list(int), "whole numbers with commas between them"),
    "conv_block_alphas": NetworkArg(_list(number), "numbers with commas between them"),
    "down_lr_weight": NetworkArg(str, "weights"),
    "mid_lr_weight": NetworkArg(str, "weights"),
    "up_lr_weight": NetworkArg(str, "weights"),
    "block_lr_zero_threshold": NetworkArg(number, "a number"),
    "dropout": NetworkArg(number, "a number"),
    "rank_dropout": NetworkArg(number, "a number"),
    "module_dropout": NetworkArg(number, "a number"),
    "loraplus_lr_ratio": NetworkArg(number, "a number"),
    "loraplus_unet_lr_ratio": NetworkArg(number, "a number"),
    "loraplus_text_encoder_lr_ratio": NetworkArg(number, "a number"),
    "preset": NetworkArg(str, "a name"),
    "include_patterns": NetworkArg(_patterns, "a list of regular expressions, ['...', '...']"),
    "exclude_patterns": NetworkArg(_patterns, "a list of regular expressions, ['...', '...']"),
    "network_reg_dims": NetworkArg(_by_pattern(int), "pattern=rank, with commas between them"),
    "network_reg_lrs": NetworkArg(_by_pattern(number), "pattern=learning rate, with commas between them"),
    "verbose": NetworkArg(flag, "True or False"),
}
# --network_args of all types.
NETWORK_ARGS = _COMMON | {name: arg for kind in types() for name, arg in kind.network_args.items()}
_RANKS = ("conv_dim", "conv_alpha", "block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas")
_MODULES = ("preset", "include_patterns", "exclude_patterns")
_LR_WEIGHTS = ("down_lr_weight", "mid_lr_weight", "up_lr_weight")


# Options of LyCORIS that have no effect here, with the reason.
_IDLE = {
    "bypass_mode": "it only changes how the same result is computed",
    "train_t5xxl": "the base model has no T5 text encoder",
    "train_llm_adapter": "the base model has no language model adapter",
    "rank_dropout_scale": "the values that rank_dropout keeps are always rescaled",
    "block_size": "it is for LyCORIS' DyLoRA; use unit for networks.dylora",
}


_OLD_NAMES = {"use_cp": "use_tucker", "use_conv_cp": "use_tucker"}  # of LyCORIS


def _renamed(network_args: Mapping[str, str]) -> dict[str, str]:
    """The options under their current names."""
    return {_OLD_NAMES.get(name, name): value for name, value in network_args.items()}


def without_effect(network_module: str, network_args: Mapping[str, str]) -> dict[str, str]:
    """The network_args without effect, each with the reason; kohya's trainer ignores them silently."""
    spelled = {_OLD_NAMES.get(name, name): name for name in network_args}
    reasons = _reasons(network_module, _renamed(network_args))
    return {spelled[name]: reason for name, reason in reasons.items()}


def _reasons(network_module: str, network_args: Mapping[str, str]) -> dict[str, str]:
    kind, reasons = type_named(MODULES.get(network_module, "")), dict[str, str]()
    if kind is not None:
        reasons |= kind.idle(network_module, network_args)
    for key in network_args:
        owner = next((other for other in types() if key in other.network_args), None)
        if key in reasons:
            continue
        if key in _IDLE:
            reasons[key] = _IDLE[key]
        elif key not in NETWORK_ARGS:
            reasons[key] = f"there is no such option{nearest(key, NETWORK_ARGS)}"
        elif owner is not None and (kind is None or key not in kind.network_args):
            reasons[key] = f"it is for {owner.title}: give network_module {owner.network_modules[0]}"
    if "block_lr_zero_threshold" in network_args and not any(name in network_args for name in _LR_WEIGHTS):
        reasons["block_lr_zero_threshold"] = f"it goes with {', '.join(_LR_WEIGHTS)}"
    return reasons


def parse_network_args(args: Mapping[str, str]) -> dict[str, Any]:
    """Parse the values of network_args; AdapterError names the option, its value and the expected type."""
    parsed = {}
    for key, text in args.items():
        if key not in NETWORK_ARGS:
            raise AdapterError(f"unknown network_args option {key}{nearest(key, NETWORK_ARGS)}")
        arg = NETWORK_ARGS[key]
        try:
            parsed[key] = arg.parse(str(text))
        except ValueError:
            raise AdapterError(f"network_args {key}={text}: it takes {arg.takes}") from None
    return parsed


def _ranks_for_zero_alphas(fields: dict[str, Any]) -> None:
    """Replace every alpha of 0 by the rank, as kohya's trainer does when it creates a module."""
    if fields["lora_alpha"] == 0 and "reg_dims" in fields:
        fields["reg_alphas"] = {pattern: float(rank) for pattern, rank in fields["reg_dims"].items()}
    for dim, alpha, dims, alphas in (
        ("r", "lora_alpha", "block_dims", "block_alphas"),
        ("conv_dim", "conv_alpha", "conv_block_dims", "conv_block_alphas"),
    ):
        rank, ranks = fields.get(dim, DEFAULT_CONV_DIM), fields.get(dims)
        if fields.get(alpha) == 0:
            fields[alpha] = rank
            if ranks and alphas not in fields:
                fields[alphas] = [0.0] * len(ranks)  # each block uses its own rank as alpha
        if alphas in fields:
            own = ranks or [rank] * len(fields[alphas])
            fields[alphas] = [alpha or float(rank) for alpha, rank in zip(fields[alphas], own, strict=True)]


def _block_weights(args: Mapping[str, Any], architecture: str) -> list[float] | None:
    """The learning-rate weight of each block; None if no weights are given."""
    if not any(name in args for name in _LR_WEIGHTS):
        return None
    down, mid, up = (args.get(name) for name in _LR_WEIGHTS)
    return block_lr_weights(architecture, down, mid, up, args.get("block_lr_zero_threshold", 0.0))


def _leave_out_zero_blocks(fields: dict[str, Any], weights: list[float]) -> None:
    """Set the rank of blocks whose learning-rate weight is 0 to 0."""
    fields["block_dims"] = without_zero_blocks(fields.get("block_dims") or [fields["r"]] * len(weights), weights)
    conv = fields.get("conv_block_dims") or ([fields["conv_dim"]] * len(weights) if "conv_dim" in fields else None)
    if conv:
        fields["conv_block_dims"] = without_zero_blocks(conv, weights)


def _kind_for(kind: AdapterType, fields: Mapping[str, Any]) -> AdapterType:
    """The type of the config, which can differ from that of --network_module if larger convolutions are adapted."""
    conv = "conv_dim" in fields or "conv_block_dims" in fields
    return (type_named(kind.with_conv) if conv and kind.with_conv else None) or kind


def _unknown_module(name: str) -> AdapterError:
    instead = next((text for start, text in _INSTEAD.items() if name.startswith(start)), None)
    return AdapterError(
        f"network_module {name}: {instead}" if instead else
        f"unknown network_module {name}{nearest(name, MODULES)}: {', '.join(MODULES)} are known"
    )  # fmt: skip


def training_args(network_module: str, args: Mapping[str, str]) -> dict[str, str]:
    """The network_args of a training, completed by defaults of the type that differ from those of its config."""
    kind = type_named(MODULES.get(network_module, ""))
    return dict(args) if kind is None else kind.training_args(args)


def network_options(
    network_module: str = "networks.lora",
    network_dim: int | None = None,
    network_alpha: float | None = None,
    network_args: Mapping[str, str] | None = None,
    architecture: str = "sd",
) -> NetworkOptions:
    """Convert kohya's network options to a config and learning rates.

    Options that kohya's trainer silently ignores (block_alphas or conv_block_dims alone) or fails on (one number as a
    block weight) take effect here. Options without effect (`without_effect`) are ignored with a warning.

    Args:
        network_module: "networks.lora", "networks.dylora", "networks.loha", "lycoris.kohya", ... or "lierla", ...
        network_dim: The rank; 4 by default.
        network_alpha: The alpha; 1 by default. 0 means the rank, as in kohya's trainer.
        network_args: Names and values as in `--network_args`, both strings.
        architecture: The base model's family: "sd" (SD1.x and SD2.x), "sdxl", "flux", "sd3".

    Returns:
        The config for PEFT, the learning rates and the other options.

    Raises:
        AdapterError: The network module is unknown, a value is invalid, or a list has the wrong length.

    >>> asked = network_options("networks.dylora", 16, 16, {"unit": "4", "conv_dim": "8"})
    >>> type(asked.config).__name__, asked.config.r, asked.config.conv_dim, asked.config.unit
    ('DyLoraConfig', 16, 8, 4)
    """
    kind = type_named(MODULES.get(network_module, ""))
    if kind is None:
        raise _unknown_module(network_module)
    asked = dict(network_args or {})
    for name, reason in without_effect(network_module, asked).items():
        logger.warning("network_args %s is ignored: %s", name, reason)
        del asked[name]
    values = parse_network_args(_renamed(asked))
    for name in ("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas"):
        check_block_list(name, values.get(name), architecture)

    if network_dim is not None and network_dim < 1:
        raise AdapterError(f"network_dim is {network_dim}: a rank is at least 1")
    fields: dict[str, Any] = {"r": 4 if network_dim is None else network_dim}
    fields["lora_alpha"] = 1.0 if network_alpha is None else network_alpha
    fields |= {name: values[name] for name in (*_RANKS, *_MODULES, *kind.network_args) if name in values}
    if "network_reg_dims" in values:
        fields["reg_dims"] = values["network_reg_dims"]
    fields |= kind.fields(network_module, fields)
    weights = _block_weights(values, architecture)
    if weights is not None and not all(weights):
        _leave_out_zero_blocks(fields, weights)
    _ranks_for_zero_alphas(fields)
    config = _kind_for(kind, fields).config(**fields)
    rest = {name: values[name] for name in values if name.startswith("loraplus") or name.endswith("dropout")}
    rest["reg_lrs"] = reg_lrs = values.get("network_reg_lrs")
    check_patterns("network_reg_lrs", reg_lrs)
    if any(rate < 0 for rate in (reg_lrs or {}).values()):
        raise AdapterError(f"network_reg_lrs={asked['network_reg_lrs']}: a learning rate is at least 0")
    return NetworkOptions(config, weights, verbose=values.get("verbose", False), **rest)
