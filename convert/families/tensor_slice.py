"""The part of a checkpoint's tensor that is one layer's weight."""

from typing import NamedTuple

import torch


class Share(NamedTuple):
    """The parts from `start` to `stop` (not with it) of a dimension in `of` equal parts."""

    start: int
    stop: int
    of: int

    def within(self, size: int) -> slice:
        """These parts of a dimension of that size.

        >>> Share(1, 2, 3).within(12)
        slice(4, 8, None)
        """
        return slice(self.start * size // self.of, self.stop * size // self.of)


class TensorSlice(NamedTuple):
    """Where a layer's weight is: in the tensor `key`, all of it or a share of its rows or columns.

    Source of the shares: open_clip stacks the weights of q, k and v (`in_proj_weight`), one third of the rows each.
    transposed: the tensor is stored as (in, out).
    """

    key: str
    rows: Share | None = None
    columns: Share | None = None
    transposed: bool = False

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The layer's own weight in the tensor, a view.

        >>> TensorSlice("in_proj_weight", rows=Share(2, 3, 3)).of(torch.arange(6).reshape(6, 1)).tolist()
        [[4], [5]]
        """
        part = tensor if self.rows is None else tensor[self.rows.within(tensor.shape[0])]
        part = part if self.columns is None else part[:, self.columns.within(part.shape[1])]
        return part.T if self.transposed else part
