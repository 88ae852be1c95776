"""Converting the changes of an adapter to another dtype."""

from collections.abc import Mapping
from typing import TypeVar

import torch

from lora_adapters.convert.errors import AdapterError

from .base import Delta
from .low_rank import LowRank, to_narrow

Key = TypeVar("Key")


def cast_pairs(pairs: Mapping[Key, LowRank], dtype: torch.dtype | None, keep_alpha: bool = False) -> dict[Key, LowRank]:
    """Convert the factors of low-rank pairs to another dtype.

    If small values of a factor would underflow, both factors are first balanced by powers of two, which keeps ΔW. If
    that is not enough, the factors of all pairs are multiplied by one power of two and their alphas reduced to match.

    Args:
        pairs: The pairs, by any key.
        dtype: The new dtype; None returns the pairs unchanged.
        keep_alpha: Do not change any alpha.

    Returns:
        The new pairs, by the same keys.

    Raises:
        AdapterError: A value is too large for the dtype; the message begins with the key.
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
    """Like `cast_pairs`, for changes of any kind: only low-rank pairs are balanced."""
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
        raise AdapterError(f"{key} has values that are too large for {str(dtype).removeprefix('torch.')}")
