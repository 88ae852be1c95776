"""Splitting the change of a fused layer into changes of its parts, and joining them again.

The weight of a fused layer consists of the weights of several layers (its parts), concatenated along the rows. Its
low-rank pair splits exactly into pairs of the parts, which share `down` and take their rows of `up`. If `up` is
block-diagonal, each component belongs to one part, and the parts' pairs have lower ranks (kohya's `split_qkv`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any

import torch
from typing_extensions import Self

from lora_adapters.convert.deltas.low_rank import LowRank
from lora_adapters.convert.errors import AdapterError

from .base import Delta, with_article
from .dora import DoRA
from .full import Full, WithBias
from .hadamard import Hadamard
from .ia3 import IA3
from .input_rotation import InputRotation
from .oft import OFT, Rotation
from .wrapper import Wrapper


def cut(change: Delta, rows: Sequence[slice]) -> list[Delta]:
    """Split the change of a fused layer into changes of its parts; `rows` are the rows of each part, in order."""
    if len(rows) == 1:
        return [change]
    if isinstance(change, LowRank):
        return [*_cut_pair(change, rows)]
    return [picked(change, (span,)) for span in rows]


def _cut_pair(pair: LowRank, rows: Sequence[slice]) -> list[LowRank]:
    ups = [pair.up[span] for span in rows]
    columns = _own_columns(ups)
    if columns is None:
        return [replace(pair, up=up) for up in ups]
    return [
        LowRank(pair.down[own], up[:, own], pair.scale * (own.stop - own.start))
        for up, own in zip(ups, columns, strict=True)
    ]


def _own_columns(ups: Sequence[torch.Tensor]) -> list[slice] | None:
    """The columns of `up` that belong to each part if `up` is block-diagonal in the parts' order, otherwise None."""
    used = torch.stack([(up != 0).flatten(1).any(0) for up in ups])
    if ups[0].shape[1] < len(ups) or not bool((used.sum(0) <= 1).all()) or not bool(used.any(1).all()):
        return None
    ends = [int(row.nonzero()[-1]) + 1 for row in used]
    ends[-1] = used.shape[1]  # assign columns of zeros to the part before them
    starts = [0, *ends[:-1]]
    if any(int(row.nonzero()[0]) < start or start >= end for row, start, end in zip(used, starts, ends, strict=True)):
        return None
    return [slice(start, end) for start, end in zip(starts, ends, strict=True)]


def halves_swapped(change: Delta, out: int) -> Delta:
    """The change of the same layer with the two halves of its `out` rows swapped."""
    return picked(change, (slice(out // 2, out), slice(0, out // 2)))


def picked(change: Delta, rows: tuple[slice, ...]) -> Delta:
    """The change of a layer whose weight consists of these rows of the changed weight, in this order."""

    def of(tensor: torch.Tensor) -> torch.Tensor:
        return tensor[rows[0]] if len(rows) == 1 else torch.cat([tensor[span] for span in rows])

    if isinstance(change, LowRank):
        return replace(change, up=of(change.up))
    if isinstance(change, WithBias):
        return replace(change, change=picked(change.change, rows), diff_b=of(change.diff_b))
    if isinstance(change, DoRA):
        if change.magnitude.shape[0] == 1:
            raise AdapterError("cannot split a DoRA of a fused layer into its parts: its magnitude is per column")
        return replace(change, change=picked(change.change, rows), magnitude=of(change.magnitude))
    if isinstance(change, Full):
        parts = {name: None if part is None else of(part) for name, part in _tensors_of(change).items()}
        return replace(change, **parts)  # type: ignore[arg-type]
    if isinstance(change, Hadamard) and change.t1 is None and change.t2 is None:
        return replace(change, w1_a=of(change.w1_a), w2_a=of(change.w2_a))
    if isinstance(change, IA3):
        return change if change.on_input else replace(change, vector=of(change.vector.reshape(-1)))
    if isinstance(change, OFT) and change.constraint == 0:
        return _picked_rotations(change, rows)
    if isinstance(change, Rows):
        return _picked_again(change, rows)
    if change.needs_base:
        raise AdapterError(f"cannot split {with_article(change.kind)} of a fused layer into its parts")
    return Rows(change, rows)


def _picked_rotations(change: OFT, rows: tuple[slice, ...]) -> OFT:
    size = change.blocks.shape[1]
    if any(span.start % size or span.stop % size for span in rows):
        raise AdapterError(f"cannot split an OFT of a fused layer: blocks of {size} rows overlap two of its parts")
    blocks = torch.cat([change.blocks[span.start // size : span.stop // size] for span in rows])
    rescale = None if change.rescale is None else torch.cat([change.rescale[span] for span in rows])
    return replace(change, blocks=blocks, rescale=rescale)


def _picked_again(change: "Rows", rows: tuple[slice, ...]) -> Delta:
    """Select rows of a `Rows`; returns the inner change if the result is all of its rows in their order."""
    own = [number for span in change.rows for number in range(span.start, span.stop)]
    picked_rows = [number for span in rows for number in own[span]]
    ends = [n for n, (one, other) in enumerate(pairwise(picked_rows), 1) if other != one + 1]
    starts = [0, *ends]
    spans = [
        slice(picked_rows[a], picked_rows[b - 1] + 1) for a, b in zip(starts, [*ends, len(picked_rows)], strict=True)
    ]
    count = change.change.out_in
    if count is not None and spans == [slice(0, count[0])]:
        return change.change
    return Rows(change.change, tuple(spans))


def row_count(change: Delta) -> int | None:
    """The number of rows of the weight of a change whose `out_in` is None.

    Args:
        change: The change.

    Returns:
        The number of rows; None for a change that acts on the columns only.

    Raises:
        AdapterError: The number does not follow from the change.
    """
    if isinstance(change, InputRotation) or (isinstance(change, IA3) and change.on_input):
        return None
    if isinstance(change, IA3):
        return change.vector.numel()
    if isinstance(change, Rotation):
        return change.blocks.shape[-3] * change.blocks.shape[-2]
    if isinstance(change, Full) and change.diff_b is not None:
        return len(change.diff_b)
    raise AdapterError(f"the number of rows does not follow from {with_article(change.kind)}")


def _tensors_of(change: Full) -> dict[str, torch.Tensor | None]:
    return {"diff": change.diff, "diff_b": change.diff_b}


def joined(pairs: Sequence[LowRank | None], rows: Sequence[int]) -> LowRank:
    """Join the pairs of the parts of a fused layer; the inverse of `cut`.

    Parts with the same `down` and scale share their components. The components of other parts are concatenated, and
    differences between their scales are multiplied into `up`.

    Args:
        pairs: The pairs of the parts, in order; None for an unchanged part.
        rows: The number of rows of each part.

    Returns:
        The pair. Its rank is the sum of the parts' ranks, with shared components counted once.

    Raises:
        AdapterError: The parts have different numbers of input channels.
    """
    changing = [pair for pair in pairs if pair is not None]
    if len({pair.down.shape[1:] for pair in changing}) != 1:
        raise AdapterError("the parts of a fused layer have different numbers of input channels")
    scale = max((abs(pair.scale) for pair in changing), default=0.0) or 1.0
    alike = all(pair.scale == changing[0].scale for pair in changing)
    scale = changing[0].scale if alike else scale
    owners: list[LowRank] = []
    starts: list[int] = []
    for pair in changing:
        if not any(_same_down(pair, owner) for owner in owners):
            starts.append(sum(owner.rank for owner in owners))
            owners.append(pair)
    rank = sum(owner.rank for owner in owners)
    dtype = torch.promote_types(changing[0].up.dtype, changing[-1].up.dtype) if alike else torch.float32
    up = torch.zeros(sum(rows), rank, dtype=dtype)
    at = 0
    for part, count in zip(pairs, rows, strict=True):
        if part is not None:
            start = starts[next(number for number, owner in enumerate(owners) if _same_down(part, owner))]
            block = part.up.flatten(1)
            up[at : at + count, start : start + part.rank] = block if alike else block.float() * (part.scale / scale)
        at += count
    down = owners[0].down if len(owners) == 1 else torch.cat([owner.down for owner in owners])
    return LowRank(down, up, scale * rank)


def whole(parts: Sequence[Delta | None], rows: Sequence[int]) -> Delta:
    """Join the changes of the parts of a fused layer, of any kind; the inverse of `cut`.

    Args:
        parts: The changes of the parts, in order; None for an unchanged part.
        rows: The number of rows of each part.

    Returns:
        A change of the parts' kind.

    Raises:
        AdapterError: The changes cannot be joined to one change of their kind.
    """
    pairs = [part for part in parts if part is None or isinstance(part, LowRank)]
    if len(pairs) == len(parts):
        return joined(pairs, rows)
    changing = [part for part in parts if part is not None]
    first = changing[0]
    if len(changing) < len(parts) or any(type(part) is not type(first) for part in changing):
        raise _apart(first)
    if isinstance(first, Rows):
        return _whole_of_rows([part for part in changing if isinstance(part, Rows)], sum(rows))
    if isinstance(first, WithBias | DoRA):
        inner = whole([part.change for part in changing], rows)  # type: ignore[attr-defined]
        return replace(_alike(changing, by_rows=_BY_ROWS[type(first)]), change=inner)
    if type(first) in _BY_ROWS and getattr(first, "t1", None) is None:
        return _alike(changing, by_rows=_BY_ROWS[type(first)])
    raise _apart(first)


# Tensors with one row for each row of the weight; all other tensors must be equal in all parts of a fused layer.
_BY_ROWS: dict[type, tuple[str, ...]] = {
    Full: ("diff", "diff_b"),
    Hadamard: ("w1_a", "w2_a"),
    DoRA: ("magnitude",),
    WithBias: ("diff_b",),
}


def _alike(parts: Sequence[Any], by_rows: tuple[str, ...]) -> Any:
    """The first part with the concatenated rows of all parts; AdapterError if other tensors or fields differ."""
    first, values = parts[0], dict[str, torch.Tensor]()
    for name in (item.name for item in fields(first) if item.name != "change"):
        own = [getattr(part, name) for part in parts]
        if name in by_rows:
            if any((value is None) != (own[0] is None) for value in own):
                raise _apart(first)
            values |= {} if own[0] is None else {name: torch.cat(own)}
        elif not all(_equal(value, own[0]) for value in own):
            raise _apart(first)
    return replace(first, **values)


def _equal(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return first is second or (first.shape == second.shape and torch.equal(first, second))
    return first is second or bool(first == second)


def _whole_of_rows(parts: "Sequence[Rows]", count: int) -> Delta:
    spans = [span for part in parts for span in part.rows]
    ends = [0, *(span.stop for span in spans)]
    if [span.start for span in spans] != ends[:-1] or ends[-1] != count:
        raise _apart(parts[0])
    inner = [part.change for part in parts]
    if any(type(change) is not type(inner[0]) for change in inner):
        raise _apart(parts[0])
    return _alike(inner, by_rows=())


def _apart(part: Delta) -> AdapterError:
    return AdapterError(
        f"cannot join {with_article(part.kind)} of one part of a fused layer with the other parts, which differ: "
        "convert them to low-rank pairs (convert --to lora)"
    )


def _same_down(first: LowRank, second: LowRank) -> bool:
    down, other = first.down, second.down
    if first is second:
        return True
    if down.shape != other.shape or down.dtype != other.dtype or first.scale != second.scale:
        return False
    return down.data_ptr() == other.data_ptr() or torch.equal(down, other)


@dataclass(frozen=True, eq=False, repr=False)
class Rows(Wrapper):
    """Some rows of another change, whose own tensors cannot be split into rows (such as LoKr)."""

    rows: tuple[slice, ...]

    @property
    def _count(self) -> int:
        return sum(span.stop - span.start for span in self.rows)

    @property
    def out_in(self) -> tuple[int, int] | None:
        """Output and input channels; None if they are not known."""
        whole = self.change.out_in
        return None if whole is None else (self._count, whole[1])

    @property
    def needs_base(self) -> bool:
        """False: changes that depend on the weight are never split into `Rows`."""
        return False

    def _of(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor[span] for span in self.rows])

    def delta(self, base_weight: torch.Tensor | None = None, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """ΔW as a dense tensor; see `Delta.delta`."""
        if base_weight is not None and not self.fits(tuple(base_weight.shape)):
            raise AdapterError(
                f"made for a weight of {list(self.out_in or ())}, but the model's weight is {list(base_weight.shape)}"
            )
        rows = self._of(self.change.delta(None, dtype))
        return rows if base_weight is None else rows.reshape(base_weight.shape)

    def bias(self, dtype: torch.dtype = torch.float32) -> torch.Tensor | None:
        """The change of the bias; None if it does not change."""
        bias = self.change.bias(dtype)
        return None if bias is None else self._of(bias)

    def scaled(self, weight: float) -> Self:
        """The delta multiplied by `weight`."""
        return replace(self, change=self.change.scaled(weight))

    def fits(self, weight_shape: tuple[int, ...]) -> bool:
        """Whether the rows fit a weight of this shape."""
        return self.out_in is not None and tuple(weight_shape[:2]) == self.out_in

    def tensors(self) -> dict[str, torch.Tensor]:
        """Raise AdapterError: files cannot store rows of another change."""
        raise AdapterError(
            f"cannot write a part of {with_article(self.kind)} of a fused layer: convert to low-rank pairs (--to lora)"
        )
