"""`Delta`, the interface of every weight change, and `TensorDelta`, the base class of most kinds."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, ClassVar, Protocol

import torch
from typing_extensions import Self

from lora_adapters.convert.deltas.low_rank import finite
from lora_adapters.convert.errors import AdapterError

Tensors = Mapping[str, torch.Tensor]  # a module's tensors by the ends of their keys, such as "lora_up.weight"


class Delta(Protocol):
    """The change ΔW of one module's weight W, and of its bias where there is one.

    A delta is immutable and holds the tensors of its file; nothing dense is built before `delta` is called.
    """

    @property
    def kind(self) -> str:
        """The name shown to users: LoRA, LoHa, LoKr, DoRA, full, norm, GLoRA, IA3, OFT or BOFT."""

    @property
    def rank(self) -> int | None:
        """The rank of the factors; None for kinds without a rank."""

    @property
    def out_in(self) -> tuple[int, int] | None:
        """Output and input channels (times the kernel size if it is flattened); None if they are not known."""

    @property
    def needs_base(self) -> bool:
        """Whether ΔW depends on W, so that `delta` must be called with it."""

    @property
    def changes_weight(self) -> bool:
        """Whether the weight changes; False if only the bias does."""

    def delta(self, base_weight: torch.Tensor | None = None, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """ΔW as a dense tensor, which is new: the caller may modify it.

        Args:
            base_weight: W, any floating dtype. If None, ΔW has the shape that follows from the file's tensors, in
                which the kernel may be flattened: (out, in * height * width).
            dtype: The dtype of ΔW and of the arithmetic.

        Returns:
            ΔW, in the shape of `base_weight`.

        Raises:
            AdapterError: `base_weight` is needed and missing, or its shape does not fit this change.
        """

    def bias(self, dtype: torch.dtype = torch.float32) -> torch.Tensor | None:
        """The change of the bias, (out,), as a new tensor; None if the bias does not change."""

    def scaled(self, weight: float) -> Self:
        """The delta multiplied by `weight`, as LyCORIS does for a multiplier of `weight`."""

    def to(self, dtype: torch.dtype | None) -> Self:
        """The same delta with its tensors in `dtype`; None keeps their dtypes."""

    def fits(self, weight_shape: tuple[int, ...]) -> bool:
        """Whether the delta fits a weight of this shape; 2-D and 4-D shapes of a 1x1 convolution are equivalent."""

    def is_finite(self) -> bool:
        """Whether all values in the tensors are finite."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors to write to a file.

        Returns:
            The tensors by the suffix of their key in LyCORIS' and kohya's files ("lora_up.weight", "alpha").

        Raises:
            AdapterError: The delta was scaled, and files of this kind cannot store a multiplier.
        """


@dataclass(frozen=True, eq=False, repr=False)
class TensorDelta:
    """Base class of the kinds: implements everything that follows from the tensors and the multiplier.

    A subclass declares its tensors as fields and defines `shape`, `_dense` and `tensors`.
    """

    kind: ClassVar[str]

    multiplier: float = field(default=1.0, kw_only=True)

    def __repr__(self) -> str:
        rank = "" if self.rank is None else f"rank {self.rank}, "
        return f"{type(self).__name__}({rank}for {self._made_for})"

    @property
    def rank(self) -> int | None:
        """The rank of the factors; None for kinds without a rank."""
        return None

    @property
    def needs_base(self) -> bool:
        """Whether ΔW depends on W."""
        return False

    @property
    def changes_weight(self) -> bool:
        """Whether the weight changes; False if only the bias does."""
        return True

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of ΔW that follows from the file's tensors."""
        raise NotImplementedError

    @property
    def out_in(self) -> tuple[int, int] | None:
        """Output and input channels (times the kernel size if it is flattened); None for a vector."""
        return (self.shape[0], self.shape[1]) if len(self.shape) > 1 else None

    @property
    def _made_for(self) -> str:
        return f"a weight of {list(self.shape)}"

    def _dense(self, base_weight: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        """ΔW as a new tensor, in any shape with the same number of elements as W."""
        raise NotImplementedError

    def delta(self, base_weight: torch.Tensor | None = None, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """ΔW as a dense tensor; see `Delta.delta`."""
        if base_weight is None:
            if self.needs_base:
                kind = with_article(self.kind)
                raise AdapterError(f"the change of {kind} module depends on the model's weight: pass base_weight")
            return self._dense(None, dtype).reshape(self.shape)
        if not self.fits(tuple(base_weight.shape)):
            raise AdapterError(f"made for {self._made_for}, but the model's weight is {list(base_weight.shape)}")
        return self._dense(base_weight, dtype).reshape(base_weight.shape)

    def bias(self, dtype: torch.dtype = torch.float32) -> torch.Tensor | None:
        """The change of the bias; None for most kinds."""
        return None

    def scaled(self, weight: float) -> Self:
        """The delta multiplied by `weight`."""
        return replace(self, multiplier=self.multiplier * weight)

    def to(self, dtype: torch.dtype | None) -> Self:
        """The same delta with its tensors in `dtype`; None keeps their dtypes."""
        if dtype is None:
            return self
        tensors: dict[str, Any] = {name: tensor.to(dtype) for name, tensor in tensor_fields(self).items()}
        return replace(self, **tensors)

    def fits(self, weight_shape: tuple[int, ...]) -> bool:
        """Whether the delta fits a weight of this shape."""
        return without_ones(self.shape) == without_ones(weight_shape)

    def is_finite(self) -> bool:
        """Whether all values in the tensors are finite."""
        return all(finite(tensor) for tensor in tensor_fields(self).values())

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors by the suffix of their key in a file."""
        raise NotImplementedError

    def _check_floating(self) -> None:
        for name, tensor in tensor_fields(self).items():
            if not tensor.is_floating_point():
                raise AdapterError(f"{name} must be floating point, not {tensor.dtype}")

    def _check_unscaled(self) -> None:
        if self.multiplier != 1:
            raise AdapterError(
                f"{with_article(self.kind)} at weight {self.multiplier:g} cannot be written: "
                "files of this kind cannot store a multiplier"
            )


def with_tensors(change: Any, take: Callable[[str, torch.Tensor], torch.Tensor], prefix: str = "") -> Any:
    """Copy a change with its tensors replaced, including those of nested changes.

    Args:
        change: A delta.
        take: Called with the name of each field and its tensor; returns the new tensor, which must have the same shape
            and be floating point (this is not checked). Fields of a nested change are named `<field>_<inner field>`,
            those of the parts of a sum `parts_<number>_<field>`.
        prefix: Prepended to all names.

    Returns:
        A delta of the same kind.
    """
    copy = object.__new__(type(change))
    values = vars(copy)
    values.update(vars(change))
    for field_name, value in vars(change).items():
        name = f"{prefix}{field_name}"
        if isinstance(value, torch.Tensor):
            values[field_name] = take(name, value)
        elif isinstance(value, tuple):
            values[field_name] = tuple(
                with_tensors(part, take, f"{name}_{at}_") if is_dataclass(part) else part
                for at, part in enumerate(value)
            )
        elif is_dataclass(value):
            values[field_name] = with_tensors(value, take, f"{name}_")
    return copy


def tensor_fields(delta: Any) -> dict[str, torch.Tensor]:
    """The tensors of a delta by field name, without those of nested deltas."""
    values = ((item.name, getattr(delta, item.name)) for item in fields(delta))
    return {name: value for name, value in values if isinstance(value, torch.Tensor)}


def with_article(kind: str) -> str:
    """The kind with its indefinite article: "a LoRA", "an IA3"."""
    return f"an {kind}" if kind in ("IA3", "OFT") else f"a {kind}"


def without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape without trailing kernel sizes of 1, so that a 1x1 convolution and a linear layer compare equal."""
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return tuple(shape)


def check_shape(name: str, tensor: torch.Tensor, *allowed: tuple[int | None, ...]) -> None:
    """Raise AdapterError unless the tensor has one of these shapes; None in a shape is any size except 0."""
    for shape in allowed:
        if len(shape) == tensor.ndim and all(
            size > 0 if want is None else size == want for size, want in zip(tensor.shape, shape, strict=True)
        ):
            return
    texts = " or ".join(
        "[" + ", ".join("any" if size is None else str(size) for size in shape_allowed) + "]"
        for shape_allowed in allowed
    )
    raise AdapterError(f"{name} has the shape {list(tensor.shape)}, expected {texts}")


def check_matrix_like(name: str, tensor: torch.Tensor, rows: int | None = None, columns: int | None = None) -> None:
    """Raise AdapterError unless the tensor is (rows, columns) or (rows, columns, 1, 1); None is any size except 0."""
    check_shape(name, tensor, (rows, columns), (rows, columns, 1, 1))


def alpha_in(change: Delta) -> float | None:
    """The alpha of a change, or of the change nested in a DoRA or `WithBias`; None for kinds without alpha."""
    inner = getattr(change, "change", None)
    return getattr(change, "alpha", None) if inner is None else alpha_in(inner)


# --- reading and writing a module's tensors --------------------------------------------------------------------------


def check_suffixes(kind: str, tensors: Tensors, required: Iterable[str], optional: Iterable[str] = ()) -> None:
    """Raise AdapterError, with the tensors' names, if required tensors are missing or unknown ones are present."""
    required = tuple(required)
    if missing := [name for name in required if name not in tensors]:
        names = ", ".join(sorted(tensors))
        raise AdapterError(f"{with_article(kind)} module lacks {', '.join(missing)}: it has only {names}")
    if unknown := sorted(set(tensors) - {*required, *optional}):
        raise AdapterError(f"unexpected tensors in {with_article(kind)} module: {', '.join(unknown)}")


def scalar_of(name: str, tensor: torch.Tensor) -> float:
    """The value of a tensor whose elements are all equal; AdapterError for other tensors and for NaN and infinity."""
    if tensor.numel() == 0 or bool((tensor != tensor.flatten()[0]).any() and not tensor.isnan().any()):
        raise AdapterError(f"{name} has the shape {list(tensor.shape)}, expected one number")
    value = float(tensor.flatten()[0])
    if not math.isfinite(value):
        raise AdapterError(f"{name} is {value}")
    return value


def alpha_of(tensors: Tensors, rank: int) -> float:
    """A module's alpha; if it is missing or 0, the rank, as in kohya's and LyCORIS' code."""
    return (scalar_of("alpha", tensors["alpha"]) if "alpha" in tensors else 0.0) or float(rank)


def times(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    """The tensor times a number, computed in float32 and cast back to its dtype; the tensor itself if factor is 1."""
    return tensor if factor == 1 else tensor.to(torch.float32, copy=True).mul_(factor).to(tensor.dtype)


def present(**tensors: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """The given tensors that are not None."""
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}
