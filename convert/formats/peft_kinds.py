"""Reading the changes of a PEFT adapter from its tensors and config: LoRA, DoRA, LoHa, LoKr, OFT, BOFT and IA3."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from lora_adapters.convert.deltas import read_module
from lora_adapters.convert.deltas.base import Delta
from lora_adapters.convert.deltas.ia3 import IA3
from lora_adapters.convert.deltas.input_rotation import InputRotation
from lora_adapters.convert.deltas.low_rank import LowRank
from lora_adapters.convert.deltas.reading import split_suffix
from lora_adapters.convert.errors import AdapterError

from .diffusers import alpha_from_config, pattern_value

KINDS = ("LORA", "LOHA", "LOKR", "OFT", "BOFT", "IA3")
_OFT = "oft_R.weight"
_BUTTERFLY = {"boft_R", "boft_s"}
_BESIDE = ("bias", "modules_to_save", "trainable_token_indices")  # options that train weights beside the adapter


def check_kind(config: Mapping[str, Any]) -> None:
    """Raise AdapterError if an adapter with this config is not supported."""
    kind = config.get("peft_type")
    if kind not in KINDS:
        raise AdapterError(f"peft_type {kind!s:.40} is not supported: expected {', '.join(KINDS)}")
    for option in _BESIDE:
        if config.get(option) not in (None, "none", [], {}):
            raise AdapterError(
                f"trained with {option}={config[option]!s:.60}, which is not supported: it trains more than the adapter"
            )


def _is_among(path: str, targets: Any) -> bool:
    """Whether a path ends with one of the target names, as PEFT matches a list of modules."""
    if targets is not None and not isinstance(targets, (list, tuple)):
        raise AdapterError(f"feedforward_modules is {targets!r:.60}, expected a list of names")
    return any(path == name or path.endswith(f".{name}") for name in targets or ())


def split_key(key: str) -> tuple[str, str]:
    """Split a key into the path of the module and the suffix.

    Args:
        key: The key of a tensor.

    Returns:
        The path and the suffix.

    Raises:
        AdapterError: No known kind of adapter uses this suffix.

    >>> split_key("mid_block.attentions.0.proj_in.lora_A.weight")
    ('mid_block.attentions.0.proj_in', 'lora_A.weight')
    """
    split = split_suffix(key)
    if split is None:
        raise AdapterError(f"{key:.200} does not end like a key of a known kind of adapter")
    parts, suffix = split
    return ".".join(parts), suffix


def read_change(config: Mapping[str, Any], path: str, tensors: Mapping[str, torch.Tensor]) -> Delta:
    """Read the change of one module.

    Args:
        config: PEFT's config, which contains the kind and the scale.
        path: The path of the module, for the patterns of the config.
        tensors: The tensors of the module by key suffix.

    Returns:
        The change.

    Raises:
        AdapterError: Tensors are missing or belong to another type of adapter.
    """
    kind = config.get("peft_type")
    if kind == "OFT":
        return _read_oft(config, path, tensors)
    if kind == "BOFT":
        if set(tensors) != _BUTTERFLY:
            raise AdapterError(f"a PEFT BOFT module must have boft_R and boft_s, got {', '.join(sorted(tensors))}")
        return read_module(tensors)
    if kind == "IA3":
        if set(tensors) != {"ia3_l"}:
            raise AdapterError(f"a PEFT IA3 module must have only ia3_l, got {', '.join(sorted(tensors))}")
        return IA3.of_peft(tensors["ia3_l"], _is_among(path, config.get("feedforward_modules")))
    if kind == "LORA":
        down = tensors.get("lora_A.weight")
        rank = len(down) if down is not None and down.ndim else 0
        alpha = alpha_from_config(config, path, rank)
        change = read_module({**tensors, "alpha": torch.tensor(alpha, dtype=torch.float64)})
        return change.scaled(0.0) if alpha == 0 and isinstance(change, LowRank) else change  # 0 was read as the rank
    dim: Any = pattern_value(config.get("rank_pattern") or {}, path, config.get("r", 8))
    dim_alpha: Any = pattern_value(config.get("alpha_pattern") or {}, path, config.get("alpha", 8))
    try:
        scale = float(dim_alpha) / float(dim)
    except (TypeError, ValueError, ZeroDivisionError):
        raise AdapterError(f"invalid alpha {dim_alpha!s:.20} or rank {dim!s:.20} in the config") from None
    return read_module(tensors).scaled(scale)


def _read_oft(config: Mapping[str, Any], path: str, tensors: Mapping[str, torch.Tensor]) -> Delta:
    """Read the change of an OFT module; its tensor names depend on the version of PEFT that wrote it."""
    if set(tensors) == {_OFT}:
        terms = int(config.get("num_cayley_neumann_terms", 5)) if config.get("use_cayley_neumann", False) else 0
        # Since 0.18, PEFT writes its version into configs and computes the series in another way.
        change = InputRotation(tensors[_OFT], terms, halves_last=config.get("peft_version") is not None)
        # The limit is for the norm of the skew matrix, in which each value occurs twice.
        return replace(change, upper=_limited(config, change.upper, 1 / math.sqrt(2)))
    if "oft_r" not in tensors or set(tensors) - {"oft_r", "oft_s"} or tensors["oft_r"].ndim != 3:
        raise AdapterError(f"a PEFT OFT module must have {_OFT} or oft_r, got {', '.join(sorted(tensors))}")
    blocks, factors = tensors["oft_r"], tensors.get("oft_s")
    if factors is None:  # before PEFT 0.14
        blocks = _limited(config, blocks, blocks.shape[1] ** 2)
        shared = int(pattern_value(config.get("rank_pattern") or {}, path, config.get("r", 8)))
        return read_module({"oft_r": blocks.expand(shared, -1, -1) if config.get("block_share") else blocks})
    if config.get("coft") and config.get("block_share"):
        raise AdapterError("an OFT of PEFT 0.14 or 0.15 with coft and block_share has an unknown limit of the norm")
    blocks = _limited(config, blocks, math.ceil(len(factors) / len(blocks)) ** 2)
    return read_module({"oft_r": blocks, "oft_s": factors})


def _limited(config: Mapping[str, Any], blocks: torch.Tensor, times: float) -> torch.Tensor:
    """Scale the blocks (count, ...) of an OFT down to the norm that `coft` allows, eps · times / √count."""
    if not config.get("coft"):
        return blocks
    try:
        limit = float(config.get("eps", 6e-5)) * times / math.sqrt(len(blocks))
    except (TypeError, ValueError):
        raise AdapterError(f"eps in the config is {config.get('eps')!r:.40}, expected a number") from None
    norms = torch.linalg.vector_norm(blocks.float().flatten(1), dim=1).clamp(min=limit)
    return blocks * (limit / norms).reshape(-1, *[1] * (blocks.ndim - 1))
