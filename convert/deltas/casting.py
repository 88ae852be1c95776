"""The changes of an adapter in another dtype."""

from collections.abc import Mapping
from typing import TypeVar

import torch

from lora_adapters.convert.errors import AdapterError

from .base import Delta
from .low_rank import LowRank, to_narrow

Key = TypeVar("Key")


def cast_pairs(pairs: Mapping[Key, LowRank], dtype: torch.dtype | None, keep_alpha: bool = False) -> dict[Key, LowRank]:
    """The pairs with their factors in another dtype; None keeps them.

    Where factors would lose small numbers in it, they are balanced by powers of two, and where that is not enough all
    alphas become smaller by the same factor (not with keep_alpha): ΔW is the same.

    Raises:
        AdapterError: a number is too large for the dtype; with the key.
    """
    if dtype is None:
        return dict(pairs)
    cast = to_narrow(pairs, dtype, keep_alpha)
    for key, pair in pairs.items():
        narrower = any(torch.finfo(factor.dtype).max > torch.finfo(dtype).max for factor in (pair.down, pair.up))
        if narrower:
            _check_finite(key, pair, cast[key], dtype)
    return cast


def cast_changes(changes: Mapping[Key, Delta], dtype: torch.dtype | None, keep_alpha: bool = False) -> dict[Key, Delta]:
    """As `cast_pairs`, of changes of any kinds: only pairs are balanced."""
    if dtype is None:
        return dict(changes)
    pairs = {key: change for key, change in changes.items() if isinstance(change, LowRank)}
    cast: dict[Key, Delta] = {**cast_pairs(pairs, dtype, keep_alpha)}
    for key, change in changes.items():
        if key not in pairs:
            cast[key] = change.to(dtype)
            _check_finite(key, change, cast[key], dtype)
    return {key: cast[key] for key in changes}


def _check_finite(key: object, before: Delta, after: Delta, dtype: torch.dtype) -> None:
    if not after.is_finite() and before.is_finite():
        raise AdapterError(f"{key} has numbers that are too large for {str(dtype).removeprefix('torch.')}")
