"""`TensorSlice`, the part of a checkpoint's tensor that is the weight of one layer."""

from typing import NamedTuple

import torch

from lora_adapters.convert.errors import AdapterError


class Share(NamedTuple):
    """The parts from `start` to `stop` (exclusive) of a dimension that consists of `of` equal parts."""

    start: int
    stop: int
    of: int

    def within(self, size: int) -> slice:
        """The indices of this share in a dimension.

        Args:
            size: The size of the dimension, a multiple of `of`.

        Returns:
            The slice.

        >>> Share(1, 2, 3).within(12)
        slice(4, 8, None)
        """
        return slice(self.start * size // self.of, self.stop * size // self.of)


class Span(NamedTuple):
    """The rows from `start` to `stop` (exclusive)."""

    start: int
    stop: int

    def within(self, size: int) -> slice:
        """The rows as a slice; the size does not matter."""
        return slice(self.start, self.stop)


class Part(NamedTuple):
    """Part `number` of the `of` parts of a fused layer; its rows depend on the layer's shape.

    The first `square` parts have as many rows as the layer has input channels; the others share the rest equally.
    """

    number: int
    of: int
    square: int = 0

    def span(self, rows: int, width: int) -> Span:
        """The rows of this part in a fused layer.

        Args:
            rows: The number of rows of the fused layer.
            width: The number of its input channels.

        Returns:
            The first row, and the one after the last.

        Raises:
            AdapterError: The rows cannot be divided like this.

        >>> Part(3, 4, square=3).span(70, 10)
        Span(start=30, stop=70)
        >>> Part(1, 3).span(12, 10)
        Span(start=4, stop=8)
        """
        first, others = self.square * width, self.of - self.square
        if first > rows or (rows - first) % max(others, 1) or (rows > first and not others):
            raise AdapterError(f"a weight of {rows} rows and {width} columns is not that of {self.of} fused layers")
        if self.number < self.square:
            return Span(self.number * width, (self.number + 1) * width)
        each, index = (rows - first) // others, self.number - self.square
        return Span(first + index * each, first + (index + 1) * each)


class TensorSlice(NamedTuple):
    """The place of a layer's weight: the tensor `key`, or a part of its rows or columns.

    open_clip stacks the weights of q, k and v (`in_proj_weight`), one third of the rows each; the original code of
    transformers such as Flux.1 stacks layers of different sizes.

    Attributes:
        key: The key of the tensor.
        rows: The rows that belong to the layer; None for all.
        columns: The columns that belong to the layer; None for all.
        transposed: Whether the tensor is stored as (in, out).
        swapped: Whether the two halves of the rows are stored in swapped order.
    """

    key: str
    rows: Share | Span | Part | None = None
    columns: Share | None = None
    transposed: bool = False
    swapped: bool = False

    def placed(self, shape: tuple[int, ...]) -> "TensorSlice":
        """Resolve the slice for a tensor of a known shape.

        Args:
            shape: The shape of the tensor.

        Returns:
            The slice with `Part` replaced by `Span`. `swapped` stays set only if the tensor has two rows for each
            column (a shift and a scale); with six, the order is the same in both layouts.

        Raises:
            AdapterError: The slice is a part of a matrix, and the tensor is not a matrix.
        """
        if isinstance(self.rows, Part) and len(shape) != 2:
            raise AdapterError(f"{self.key} has the shape {list(shape)}, expected a matrix")
        rows = self.rows.span(shape[0], shape[1]) if isinstance(self.rows, Part) else self.rows
        return self._replace(rows=rows, swapped=self.swapped and len(shape) == 2 and shape[0] == 2 * shape[1])

    @property
    def bias(self) -> "TensorSlice | None":
        """The place of the layer's bias, if it has one; None if the weight's key does not end in "weight".

        >>> bias = TensorSlice("attn.in_proj_weight", rows=Share(1, 2, 3)).bias
        >>> bias.key, bias.rows
        ('attn.in_proj_bias', Share(start=1, stop=2, of=3))
        """
        if not self.key.endswith("weight"):
            return None
        return TensorSlice(f"{self.key.removesuffix('weight')}bias", self.rows, swapped=self.swapped)

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Extract the weight of the layer from a tensor.

        Args:
            tensor: The tensor of the file, in its full shape.

        Returns:
            A view of the tensor; a copy if halves are swapped.

        >>> TensorSlice("in_proj_weight", rows=Share(2, 3, 3)).of(torch.arange(6).reshape(6, 1)).tolist()
        [[4], [5]]
        """
        part = self._view(tensor)
        return torch.cat(part.chunk(2)[::-1]) if self.swapped else part

    def put(self, tensor: torch.Tensor, weight: torch.Tensor) -> None:
        """Write the layer's weight into the tensor."""
        self._view(tensor).copy_(torch.cat(weight.chunk(2)[::-1]) if self.swapped else weight)

    def _view(self, tensor: torch.Tensor) -> torch.Tensor:
        assert not isinstance(self.rows, Part), self
        part = tensor if self.rows is None else tensor[self.rows.within(tensor.shape[0])]
        part = part if self.columns is None else part[:, self.columns.within(part.shape[1])]
        return part.T if self.transposed else part
