"""The best low-rank approximations of an adapter's changes, of any kind, one module at a time."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from lora_adapters.convert.errors import AdapterError
from lora_adapters.convert.families.names import ModuleName
from lora_adapters.convert.families.registry import kind_of
from lora_adapters.convert.progress import progress

from .base import Delta, with_article
from .dense_svd import best_approximation
from .dora import DoRA
from .full import Full, WithBias
from .low_rank import LowRank
from .norm import Norm
from .rank_choice import dynamic
from .sum import Sum, as_pair
from .svd import Fit, Rules, clamp, reduced, rules, with_rank_facts


def reduce_modules(
    modules: Mapping[ModuleName, Delta],
    rules: Rules,
    clamp_quantile: float | None = None,
    device: torch.device | None = None,
    keep_scale: bool = False,
    base_weight: Callable[[ModuleName], torch.Tensor] | None = None,
) -> tuple[dict[ModuleName, LowRank], dict[ModuleName, Fit]]:
    """The best low-rank approximation of the change of every module.

    Args:
        modules: Changes of weights, not of norms or biases; see `weights_only`. Low-rank pairs are reduced from their
            factors, other kinds from the dense ΔW.
        rules: Choose the ranks.
        clamp_quantile: See `svd.clamp`; None disables clamping.
        device: The device of the computation; None for the device of the tensors.
        keep_scale: Keep alpha / rank of pairs instead of setting it to 1.
        base_weight: Returns the weight of a module in the model, for changes that depend on it.

    Returns:
        The new pairs and their approximation errors, by module.

    Raises:
        AdapterError: A value is not finite, or a change depends on the model's weight and `base_weight` is None; the
            message begins with the module.
    """
    results, fits = {}, {}
    for module, change in progress(modules.items(), "SVD", len(modules)):
        pair = as_pair(change)
        try:
            if pair is None:
                results[module], fits[module] = approximated(module, change, rules, clamp_quantile, device, base_weight)
                continue
            less, fits[module] = reduced(pair, rules.of(pair), clamp_quantile, device)
        except AdapterError as error:
            raise AdapterError(f"{module}: {error}") from None
        results[module] = less.with_alpha(pair.scale * less.rank) if keep_scale and pair.alpha else less
    return results, fits


def approximated(
    module: ModuleName,
    change: Delta,
    rules: Rules,
    clamp_quantile: float | None = None,
    device: torch.device | None = None,
    base_weight: Callable[[ModuleName], torch.Tensor] | None = None,
) -> tuple[LowRank, Fit]:
    """The best low-rank approximation of a change of any kind, from the dense ΔW.

    Args:
        module: The module, for error messages and `base_weight`.
        change: The change, which must not change the bias.
        rules: Choose the rank.
        clamp_quantile: See `svd.clamp`; None disables clamping.
        device: The device of the computation; None for the device of the tensors.
        base_weight: Returns the weight of a module in the model, for changes that depend on it.

    Returns:
        A pair in float32 on the CPU with alpha = rank, and its approximation error.

    Raises:
        AdapterError: The change includes a bias, has NaN or infinite values, or depends on a weight that is not given.
    """
    if change.bias() is not None:
        raise AdapterError("changes the bias too, which a low-rank pair cannot store")
    dense = _dense(module, change, base_weight)
    matrix = dense.flatten(1).to(device)
    large = dense.ndim == 4 and dense.shape[2:] != (1, 1)
    if bool(matrix.any()):
        rule, most = (rules.conv, rules.most[1]) if large else (rules.linear, rules.most[0])
        up, down, fit = best_approximation(matrix, rule, most, direct=clamp_quantile is not None)
    else:
        up, down, fit = matrix.new_zeros(len(matrix), 1), matrix.new_zeros(1, matrix.shape[1]), Fit(0.0, 0.0)
    if clamp_quantile is not None:
        up, down = clamp(up, down, clamp_quantile)
        fit = Fit(fit.total, float((matrix - up @ down).square().sum()))
    rank = up.shape[1]
    down = down.cpu().contiguous().reshape(rank, *dense.shape[1:])
    up = up.cpu().contiguous().reshape(len(up), rank, *[1] * (dense.ndim - 2))
    return LowRank(down, up, float(rank)), fit


def _dense(module: ModuleName, change: Delta, base_weight: Callable[[ModuleName], torch.Tensor] | None) -> torch.Tensor:
    """ΔW as a matrix or a 4-D kernel; checks that all values are finite."""
    if not change.needs_base:
        dense = change.delta()
    elif base_weight is not None:
        dense = change.delta(base_weight(module))
    else:
        raise AdapterError(
            f"the change of {with_article(change.kind)} module depends on the model's weight: "
            "run `lora-adapters convert --to lora --sd_model MODEL`, or pass --sd_model to resize or svd-merge"
        )
    if dense.ndim == 2 and kind_of(module) == "conv3x3" and dense.shape[1] % 9 == 0:
        dense = dense.reshape(len(dense), -1, 3, 3)  # kinds without Tucker cores have flattened kernels
    if dense.ndim not in (2, 4):
        raise AdapterError(f"a change of the shape {list(dense.shape)} has no low-rank approximation")
    if not math.isfinite(float(dense.sum())):
        raise AdapterError("contains NaN or infinite values")
    return dense


def weights_only(modules: Mapping[ModuleName, Delta]) -> tuple[dict[ModuleName, Delta], list[str]]:
    """The changes that low-rank pairs can approximate, without norms and biases; and the names of those left out."""
    kept: dict[ModuleName, Delta] = {}
    left_out: list[str] = []
    for module, change in modules.items():
        matrix = None if isinstance(change, Norm) or not change.changes_weight else _without_bias(change)
        if matrix is not None:
            kept[module] = matrix
        if matrix is None or matrix is not change:
            left_out.append(str(module) if isinstance(change, Norm) else f"{module}.bias")
    return kept, left_out


def _without_bias(change: Delta) -> Delta:
    if change.bias() is None:
        return change
    if isinstance(change, WithBias):
        return change.change
    if isinstance(change, DoRA):
        return replace(change, change=_without_bias(change.change))
    if isinstance(change, Full):
        return replace(change, diff_b=None)
    if isinstance(change, Sum):
        return Sum(tuple(_without_bias(part) for part in change.parts if part.changes_weight))
    return change


def svd(adapter: Any, rank, conv_rank=None, target_error=None, device=None, clamp_quantile=None) -> Any:
    """The best low-rank approximation of an adapter; see `Adapter.svd`."""
    modules, _ = reduce_modules(
        adapter.modules, rules(rank, conv_rank, target_error), clamp_quantile, torch.device(device or "cpu")
    )
    return _reduced_adapter(adapter, modules)


def resize(adapter: Any, rank, conv_rank=None, dynamic_rule=None) -> Any:
    """The best low-rank approximation of an adapter that keeps its scales; see `Adapter.resize`."""
    conv = rank if conv_rank is None else conv_rank
    chosen = rules(rank, conv)
    if dynamic_rule is not None:
        method, parameter = dynamic_rule
        chosen = Rules(dynamic(method, parameter, rank), dynamic(method, parameter, conv))
    modules, _ = reduce_modules(adapter.modules, chosen, keep_scale=True)
    return _reduced_adapter(adapter, modules)


def _reduced_adapter(adapter: Any, modules: Mapping[ModuleName, LowRank]) -> Any:
    metadata = with_rank_facts(modules, adapter.plain_metadata())
    return replace(adapter, modules=modules, metadata=metadata, stored={})
