"""Merging adapters in the merging programs: as a sum, or by TIES, DARE or magnitude pruning."""

from collections.abc import Mapping, Sequence
from typing import Any

from lora_adapters.convert.adapter import Adapter
from lora_adapters.convert.choices import METHODS
from lora_adapters.convert.deltas.combined import Combination
from lora_adapters.convert.errors import UsageError

from .merge import combination, weighted_sum

_OF_METHODS = ("density", "seed", "majority_sign_method")


def combination_of(args: Any) -> Combination | None:
    """The merging method of the options, None for the sum; UsageError if the options contradict each other."""
    options = {name: getattr(args, name) for name in _OF_METHODS if getattr(args, name) is not None}
    if args.method == "linear":
        if options:
            raise UsageError(f"--{next(iter(options))} requires a --method that prunes: {', '.join(METHODS)}")
        return None
    if "density" not in options:
        raise UsageError(f"--method {args.method} needs --density, the share of values that it keeps, such as 0.5")
    if "seed" in options and not args.method.startswith("dare"):
        raise UsageError(f"--seed requires dare_linear or dare_ties: {args.method} is not random")
    if "majority_sign_method" in options and not args.method.endswith("ties"):
        raise UsageError(f"--majority_sign_method requires ties or dare_ties: {args.method} does not elect signs")
    return Combination(args.method, args.density, args.majority_sign_method or "total", args.seed or 0)


def put_together(adapters: Mapping[str, Adapter], ratios: Sequence[float], how: Combination | None) -> Adapter:
    """The weighted sum of adapters, or their combination."""
    return weighted_sum(adapters, ratios) if how is None else combination(adapters, ratios, how)
