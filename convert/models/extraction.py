"""Extracting an adapter from two models: the best approximation of the difference of their weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from lora_adapters.convert.choices import EXTRACTED
from lora_adapters.convert.deltas.base import Delta
from lora_adapters.convert.deltas.dense_svd import best_approximation
from lora_adapters.convert.deltas.full import Full
from lora_adapters.convert.deltas.low_rank import LowRank
from lora_adapters.convert.deltas.nearest_kronecker import nearest_kronecker, nearest_within
from lora_adapters.convert.deltas.rank_choice import by_error
from lora_adapters.convert.deltas.svd import Fit, Rules, clamp, rules, with_rank_facts
from lora_adapters.convert.errors import AdapterError
from lora_adapters.convert.families.names import ModuleName
from lora_adapters.convert.families.registry import BASE_VERSION, is_v2, role_of
from lora_adapters.convert.progress import progress
from lora_adapters.convert.storage.checkpoint import Checkpoint

_ROWS = 256  # the number of rows that are cast at a time
Approximate = Callable[[torch.Tensor], tuple[Delta, Fit]]  # approximates a difference that is not zero


@dataclass(frozen=True)
class Difference:
    """The result of comparing two models: changes, metadata, and the approximation error of each module (`fits`).

    `largest` is the largest absolute difference in each text encoder; `left_out` are the text encoders that are equal.
    """

    modules: Mapping[ModuleName, Delta]
    metadata: dict[str, str]
    fits: dict[ModuleName, Fit]
    largest: dict[str, float]
    left_out: tuple[str, ...]


def approximate_difference(
    base: str | Path,
    tuned: str | Path,
    rank: int | None,
    conv_rank: int | None = None,
    *,
    target_error: float | None = None,
    min_diff: float = 0.0,
    clamp_quantile: float | None = None,
    device: torch.device | str | None = None,
    v_prediction: bool = False,
) -> Difference:
    """Approximate the difference between two models, tuned - base, by low-rank changes.

    Args:
        base: The base model, a checkpoint file or a Diffusers folder.
        tuned: The fine-tuned model, a checkpoint file or a Diffusers folder.
        rank: The rank of linear layers and 1x1 convolutions; None is allowed with `target_error`.
        conv_rank: The rank of larger convolutions. ResNet blocks and samplers are then included (LoRA-C3Lier); None
            excludes both (LoRA-LierLa).
        target_error: Use the smallest ranks that reach this relative error, at most `rank` and `conv_rank` if these are
            given.
        min_diff: A text encoder is left out if no value differs by more than this.
        clamp_quantile: See `svd.clamp`; None disables clamping.
        device: The device of the computation; None for the CPU.
        v_prediction: Record that the base model is trained for v-prediction.

    Returns:
        The changes, their approximation errors, and the text encoders that were left out.

    Raises:
        AdapterError: The models are of different kinds, or equal.
    """
    chosen = rules(rank, conv_rank, target_error)
    approximated = partial(
        _low_rank,
        chosen=chosen,
        most=(None, None) if target_error is not None else (rank, conv_rank or rank),
        clamp_quantile=clamp_quantile,
    )
    kind = "lierla" if conv_rank is None else "c3lier"
    return _approximate(base, tuned, kind, approximated, min_diff, device, v_prediction)


def approximate_otherwise(
    base: str | Path,
    tuned: str | Path,
    algo: str,
    *,
    factor: int = -1,
    target_error: float | None = None,
    min_diff: float = 0.0,
    device: torch.device | str | None = None,
    v_prediction: bool = False,
) -> Difference:
    """Extract the difference between two models, tuned - base, as LoKr or in full, for all modules of LoRA-C3Lier.

    Args:
        base: The base model, a checkpoint file or a Diffusers folder.
        tuned: The fine-tuned model, a checkpoint file or a Diffusers folder.
        algo: "lokr" (the nearest Kronecker products) or "full" (the exact differences).
        factor: For LoKr; see `nearest_kronecker.split`.
        target_error: Use the smallest LoKr that reaches this relative error, instead of `factor`.
        min_diff: A text encoder is left out if no value differs by more than this.
        device: The device of the computation; None for the CPU.
        v_prediction: Record that the base model is trained for v-prediction.

    Returns:
        The changes, their approximation errors, and the text encoders that were left out.

    Raises:
        AdapterError: The algorithm is unknown, or the models are of different kinds, or equal.
    """
    if algo not in EXTRACTED:
        raise AdapterError(f"unknown algo {algo}: choose one of {', '.join(EXTRACTED)}")
    if algo == "full":
        approximated: Approximate = _full
    elif target_error is not None:
        by_error(target_error)  # only to validate it
        approximated = partial(nearest_within, error=target_error)
    else:
        approximated = partial(nearest_kronecker, factor=factor)
    return _approximate(base, tuned, "c3lier", approximated, min_diff, device, v_prediction)


def _approximate(
    base: str | Path,
    tuned: str | Path,
    kind: str,
    approximated: Approximate,
    min_diff: float,
    device: torch.device | str | None,
    v_prediction: bool,
) -> Difference:
    first, second = Checkpoint.open(base), Checkpoint.open(tuned)
    _check_alike(first, second)
    modules = [module for module in second.modules if second.family.covers(kind, module)]
    difference = partial(_difference, first, second, first.modules, second.modules)
    largest = _largest_differences(modules, difference)
    left_out = tuple(component for component, value in largest.items() if value <= min_diff)
    modules = [module for module in modules if module.component not in left_out]
    changes: dict[ModuleName, Delta] = {}
    fits = {}
    target = torch.device(device or "cpu")
    for module in progress(modules, "extracting", len(modules)):
        delta = difference(module)
        if bool(delta.any()):
            changes[module], fits[module] = approximated(delta.to(target))
        del delta  # free it before the next one is computed
    if not changes:
        raise AdapterError(f"{base} and {tuned} have the same weights: there is nothing to extract")
    version = first.version
    if v_prediction:
        version = first.family.version(version.text_width, "v") or version
    facts = {BASE_VERSION: version.value, "ss_v2": str(is_v2(version.value))}
    return Difference(changes, with_rank_facts(changes, facts), fits, largest, left_out)


def _check_alike(first: Checkpoint, second: Checkpoint) -> None:
    families = [checkpoint.version.title for checkpoint in (first, second)]
    if families[0] != families[1]:
        raise AdapterError(f"{first.path} is {families[0]}, but {second.path} is {families[1]}")
    for here, there in ((first, second), (second, first)):
        alone = here.modules.keys() - there.modules.keys()
        if alone:
            there.check_absent()
            raise AdapterError(f"{min(alone)} is in {here.path}, but not in {there.path}")


def _difference(first: Checkpoint, second: Checkpoint, ours, theirs, module: ModuleName) -> torch.Tensor:
    """tuned - base in float32; subtracted in float64 if one of the models is."""
    old, new = first.read(module, ours[module]), second.read(module, theirs[module])
    if old.numel() != new.numel() or old.shape[:2] != new.shape[:2]:
        raise AdapterError(f"{module} is {list(old.shape)} in {first.path}, but {list(new.shape)} in {second.path}")
    wide = torch.float64 if torch.float64 in (old.dtype, new.dtype) else torch.float32
    delta = new.reshape(old.shape).to(wide, copy=True)
    for part, rows in zip(delta.split(_ROWS), old.split(_ROWS), strict=True):  # avoids a second wide copy
        part.sub_(rows.to(wide))
    delta = delta.to(torch.float32)
    if not bool(torch.isfinite(delta.sum())):
        raise AdapterError(f"{module} has NaN or infinite values in {first.path} or {second.path}")
    return delta


def _largest_differences(
    modules: list[ModuleName], difference: Callable[[ModuleName], torch.Tensor]
) -> dict[str, float]:
    largest: dict[str, float] = {}
    for module in modules:
        if role_of(module.component) == "text_encoder":
            value = float(difference(module).abs().max())
            largest[module.component] = max(largest.get(module.component, 0.0), value)
    return largest


def _full(delta: torch.Tensor) -> tuple[Full, Fit]:
    return Full(delta.cpu().contiguous()), Fit(float(delta.double().square().sum()), 0.0)


def _low_rank(
    delta: torch.Tensor, chosen: Rules, most: tuple[int | None, int | None], clamp_quantile: float | None
) -> tuple[LowRank, Fit]:
    """The best pair. `most` are the largest ranks that the rules can choose for linear layers and convolutions."""
    matrix = delta.reshape(len(delta), -1)
    large = delta.ndim == 4 and delta.shape[2:] != (1, 1)
    rule, direct = chosen.conv if large else chosen.linear, clamp_quantile is not None
    up, down, fit = best_approximation(matrix, rule, most[large], direct)
    if clamp_quantile is not None:
        up, down = clamp(up, down, clamp_quantile)
        fit = Fit(fit.total, float((matrix - up @ down).square().sum()))
    count, extra = up.shape[1], (1,) * (delta.ndim - 2)
    down = down.cpu().contiguous().reshape(count, *delta.shape[1:])
    return LowRank(down, up.cpu().contiguous().reshape(*up.shape, *extra), float(count)), fit
