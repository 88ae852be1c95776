"""The mean of several changes of one weight, as a change of the same kind.

The changes ΔW are averaged, not the factors: the mean of `up` times the mean of `down` would contain products of the
`up` of one change with the `down` of another, and would depend on how each change is factorised.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from lora_adapters.convert.errors import AdapterError

from .base import Delta, with_article
from .dense_svd import best_approximation
from .full import Full
from .low_rank import LowRank, add_up
from .orthonormal import orthonormal
from .rank_choice import fixed
from .sum import as_pair
from .svd import Fit, reduced


def mean(changes: Sequence[Delta], count: int, unit: int | None = None) -> tuple[Delta, Fit]:
    """The mean of changes, and its approximation error.

    The mean of low-rank pairs has a higher rank than the pairs: it is approximated at the largest of their ranks, with
    the alpha / rank of the first pair that has an effect. The mean of full changes and norms is exact.

    Args:
        changes: At least one change.
        count: The divisor of the sum. If it is larger than `len(changes)`, the missing changes count as zero.
        unit: For DyLoRAs, the step between the ranks that they can be truncated to: the result truncated to any of
            these ranks is close to the mean of the changes truncated to it. None for other changes.

    Returns:
        The mean, of the same kind, and its approximation error.

    Raises:
        AdapterError: The kinds differ, the mean is not a change of the same kind, the weights have different shapes,
            or DyLoRAs have different ranks.
    """
    pairs = [pair for change in changes if (pair := as_pair(change)) is not None]
    if len(pairs) == len(changes):
        return _nested(pairs, count, unit) if unit else _best(pairs, count)
    if all(type(change) is type(changes[0]) and isinstance(change, Full) for change in changes):
        return _mean_of_full([change for change in changes if isinstance(change, Full)], count), Fit(0.0, 0.0)
    kinds = dict.fromkeys(change.kind for change in changes if not isinstance(change, LowRank | Full))
    raise AdapterError(
        f"cannot average {' and '.join(map(with_article, kinds or ['LoRA']))}, or changes of different kinds: "
        "convert all to low-rank pairs first with `lora-adapters convert --to lora --rank N`"
    )


def _best(pairs: Sequence[LowRank], count: int) -> tuple[LowRank, Fit]:
    total = add_up([pair.scaled(1 / count) for pair in pairs])
    rank = max(pair.rank for pair in pairs)
    less, fit = reduced(total, fixed(rank))
    scale = next((pair.scale for pair in pairs if pair.scale), 1.0)
    return less.with_alpha(scale * less.rank), fit


def _nested(pairs: Sequence[LowRank], count: int, unit: int) -> tuple[LowRank, Fit]:
    first = pairs[0]
    if len({pair.rank for pair in pairs}) > 1:
        ranks = ", ".join(str(pair.rank) for pair in pairs)
        raise AdapterError(f"cannot average DyLoRAs of different ranks ({ranks}): they must have the same rank")
    scale = next((pair.scale for pair in pairs if pair.scale), 1.0)
    total = add_up([pair.scaled(1 / count) for pair in pairs], scale)
    ups, downs = total.matrices()
    left, of_up = orthonormal(ups)
    right, of_down = orthonormal(downs.T)
    left_over, whole = torch.zeros(2, left.shape[1], right.shape[1], dtype=torch.float64)
    up, down = ups.new_zeros(len(ups), first.rank), downs.new_zeros(first.rank, downs.shape[1])
    for start in range(0, first.rank, unit) if bool(ups.any()) and bool(downs.any()) else ():
        block = range(start, min(start + unit, first.rank))
        at = [number * first.rank + component for number in range(len(pairs)) for component in block]
        added = of_up[:, at] @ of_down[:, at].T
        whole += added
        left_over += added
        if not bool(left_over.any()):
            continue
        columns, rows, _ = best_approximation(left_over, fixed(len(block)), len(block))
        left_over -= columns @ rows
        place = slice(start, start + columns.shape[1])
        up[:, place], down[place] = (left @ columns).float(), (rows @ right.T).float()
    shaped = LowRank(
        down.reshape(first.rank, *total.down.shape[1:]),
        up.reshape(len(up), first.rank, *total.up.shape[2:]),
        scale * first.rank,
    )
    return shaped, Fit(float(whole.square().sum()) * scale**2, float(left_over.square().sum()) * scale**2)


def _mean_of_full(changes: Sequence[Full], count: int) -> Full:
    first = changes[0]

    def mean_of(tensors: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
        there = [tensor for tensor in tensors if tensor is not None]
        if len({tensor.shape for tensor in there}) > 1:
            raise AdapterError(f"weight shapes differ: {' and '.join(str(list(tensor.shape)) for tensor in there)}")
        return torch.stack(there).sum(0) / count if there else None

    return replace(
        first,
        diff=mean_of([None if change.diff is None else change.diff.float() * change.multiplier for change in changes]),
        diff_b=mean_of([change.bias() for change in changes]),
        multiplier=1.0,
    )
