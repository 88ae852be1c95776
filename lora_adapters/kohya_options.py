"""kohya's --network_module, --network_dim, --network_alpha and --network_args as a config."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lora_adapters.convert.errors import AdapterError
from lora_adapters.convert.families.names import nearest
from lora_adapters.convert.families.registry import by_name
from lora_adapters.convert.formats.metadata import DYLORA_FACTS
from lora_adapters.convert.parsing import number
from lora_adapters.types.config import C3LierConfig, DyLoraConfig, LierLaConfig

from .block_lr import block_lr_weights, without_zero_blocks
from .target_modules import check_block_list

logger = logging.getLogger(__name__)
MODULES = {
    "networks.lora": "lora",
    "network.lora": "lora",
    "lora": "lora",
    "lierla": "lora",
    "c3lier": "c3lier",
    "networks.dylora": "dylora",
    "network.dylora": "dylora",
    "dylora": "dylora",
}
# What to take in place of modules that are not there.
_INSTEAD = {
    "lycoris": "LyCORIS (LoHa, LoKr, ...) is not supported; for its algo=lora or locon give networks.lora, with "
    "conv_dim and conv_alpha in network_args",
    "networks.lora_fa": "LoRA-FA, which trains `up` alone, is not supported; give networks.lora, which trains both and "
    "makes a file of the same kind",
    "networks.oft": "OFT is not supported; networks.lora and networks.dylora are",
    "networks.loha": "LoHa is not supported; networks.lora and networks.dylora are",
    "networks.lokr": "LoKr is not supported; networks.lora and networks.dylora are",
}


@dataclass(frozen=True)
class NetworkOptions:
    """What kohya's network options say: the layers, and the learning rates and dropouts that go with them."""

    config: LierLaConfig
    block_lr_weights: list[float] | None = None
    loraplus_lr_ratio: float | None = None
    loraplus_unet_lr_ratio: float | None = None
    loraplus_text_encoder_lr_ratio: float | None = None
    rank_dropout: float | None = None
    module_dropout: float | None = None


def _list(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    return lambda text: [kind(item.strip()) for item in text.split(",")]


def _flag(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0"):
        raise ValueError
    return text.lower() in ("true", "1")


_KINDS: dict[str, tuple[Callable[[str], Any], str]] = {
    "conv_dim": (int, "a whole number"),
    "conv_alpha": (number, "a number"),
    "block_dims": (_list(int), "whole numbers with commas between them"),
    "block_alphas": (_list(number), "numbers with commas between them"),
    "conv_block_dims": (_list(int), "whole numbers with commas between them"),
    "conv_block_alphas": (_list(number), "numbers with commas between them"),
    "down_lr_weight": (str, "weights"),
    "mid_lr_weight": (str, "weights"),
    "up_lr_weight": (str, "weights"),
    "block_lr_zero_threshold": (number, "a number"),
    "unit": (int, "a whole number"),
    "rank_scaling": (str, "a name"),
    "rank_sampling": (str, "a name"),
    "freeze_lower": (_flag, "True or False"),
    "rank_dropout": (number, "a number"),
    "module_dropout": (number, "a number"),
    "loraplus_lr_ratio": (number, "a number"),
    "loraplus_unet_lr_ratio": (number, "a number"),
    "loraplus_text_encoder_lr_ratio": (number, "a number"),
}
_LR_WEIGHTS = ("down_lr_weight", "mid_lr_weight", "up_lr_weight")


def without_effect(network_module: str, network_args: Mapping[str, str]) -> dict[str, str]:
    """The network_args that change nothing, each with the reason: kohya's trainer ignores them without a word."""
    dylora, found = MODULES.get(network_module) == "dylora", {}
    for key in network_args:
        if key not in _KINDS:
            found[key] = f"there is no such option{nearest(key, _KINDS)}"
        elif key in DYLORA_FACTS and not dylora:
            found[key] = "it is for DyLoRA: give network_module networks.dylora"
    if "block_lr_zero_threshold" in network_args and not any(name in network_args for name in _LR_WEIGHTS):
        found["block_lr_zero_threshold"] = f"it goes with {', '.join(_LR_WEIGHTS)}"
    return found


def parse_network_args(args: Mapping[str, str]) -> dict[str, Any]:
    """The values of network_args in their own types; AdapterError names the option, its value and what it takes."""
    parsed = {}
    for key, text in args.items():
        if key not in _KINDS:
            raise AdapterError(f"unknown network_args option {key}{nearest(key, _KINDS)}")
        kind, wanted = _KINDS[key]
        try:
            parsed[key] = kind(str(text))
        except ValueError:
            raise AdapterError(f"network_args {key}={text}: it takes {wanted}") from None
    return parsed


def _ranks_for_zero_alphas(fields: dict[str, Any]) -> None:
    """Put the rank in place of every alpha of 0, as kohya's trainer does where it makes a module."""
    for dim, alpha, dims, alphas in (
        ("r", "lora_alpha", "block_dims", "block_alphas"),
        ("conv_dim", "conv_alpha", "conv_block_dims", "conv_block_alphas"),
    ):
        rank, ranks = fields.get(dim, C3LierConfig.conv_dim), fields.get(dims)
        if fields.get(alpha) == 0:
            fields[alpha] = rank
            if ranks and alphas not in fields:
                fields[alphas] = [0.0] * len(ranks)  # each block its own rank, not that of the others
        if alphas in fields:
            own = ranks or [rank] * len(fields[alphas])
            fields[alphas] = [one or float(of_block) for one, of_block in zip(fields[alphas], own, strict=True)]


def _unknown_module(name: str) -> AdapterError:
    instead = next((text for start, text in _INSTEAD.items() if name.startswith(start)), None)
    return AdapterError(
        f"network_module {name}: {instead}" if instead else
        f"unknown network_module {name}{nearest(name, MODULES)}: {', '.join(MODULES)} are known"
    )  # fmt: skip


def network_options(
    network_module: str = "networks.lora",
    network_dim: int | None = None,
    network_alpha: float | None = None,
    network_args: Mapping[str, str] | None = None,
    architecture: str = "sd",
) -> NetworkOptions:
    """The config and rates that kohya's options mean, for a family of that name: "sd" (SD1.x, SD2.x) or "sdxl".

    Rank and alpha default to 4 and 1; an alpha of 0 is the rank, as in kohya's trainer. Where kohya's trainer
    ignores an option without a word (block_alphas or conv_block_dims alone) or fails on it (one number as a block
    weight), it means here what it says. Options of which `without_effect` says so are left out with a warning.
    AdapterError for unknown modules, wrong values and wrong list lengths.

    >>> asked = network_options("networks.dylora", 16, 16, {"unit": "4", "conv_dim": "8"})
    >>> type(asked.config).__name__, asked.config.r, asked.config.conv_dim, asked.config.unit
    ('DyLoraConfig', 16, 8, 4)
    """
    kind = MODULES.get(network_module)
    if kind is None:
        raise _unknown_module(network_module)
    asked = dict(network_args or {})
    for name, reason in without_effect(network_module, asked).items():
        logger.warning("network_args %s is ignored: %s", name, reason)
        del asked[name]
    given = parse_network_args(asked)
    for name in ("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas"):
        check_block_list(name, given.get(name), architecture)

    if network_dim is not None and network_dim < 1:
        raise AdapterError(f"network_dim is {network_dim}: a rank is at least 1")
    fields: dict[str, Any] = {"r": 4 if network_dim is None else network_dim}
    fields["lora_alpha"] = 1.0 if network_alpha is None else network_alpha
    names = ("conv_dim", "conv_alpha", "block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas")
    fields |= {name: given[name] for name in (*names, *DYLORA_FACTS) if name in given}
    weights = None
    if any(name in given for name in _LR_WEIGHTS):
        down, mid, up = (given.get(name) for name in _LR_WEIGHTS)
        weights = block_lr_weights(architecture, down, mid, up, given.get("block_lr_zero_threshold", 0.0))
        if not all(weights):
            dims = fields.get("block_dims") or [fields["r"]] * by_name(architecture).blocks.count
            fields["block_dims"] = without_zero_blocks(dims, weights)
            conv = fields.get("conv_block_dims")
            conv = conv or ([fields["conv_dim"]] * by_name(architecture).blocks.count if "conv_dim" in fields else None)
            if conv:
                fields["conv_block_dims"] = without_zero_blocks(conv, weights)
    _ranks_for_zero_alphas(fields)
    conv_given = "conv_dim" in fields or "conv_block_dims" in fields
    config_type = DyLoraConfig if kind == "dylora" else C3LierConfig if conv_given or kind == "c3lier" else LierLaConfig
    rest = {name: given[name] for name in given if name.startswith("loraplus") or name.endswith("_dropout")}
    return NetworkOptions(config_type(**fields), weights, **rest)
