"""The change of one module's weight, whatever kind of adapter makes it."""

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
        """The name that users know it by: LoRA, LoHa, LoKr, DoRA, full, norm, GLoRA, IA3, OFT or BOFT."""

    @property
    def rank(self) -> int | None:
        """The rank of its factors; None for a kind without one."""

    @property
    def out_in(self) -> tuple[int, int] | None:
        """Output channels, and input channels (times the kernel, where it is flattened); None if it tells none."""

    @property
    def needs_base(self) -> bool:
        """Whether ΔW depends on W, so that `delta` has to be given it."""

    @property
    def changes_weight(self) -> bool:
        """Whether it changes the weight, and not the bias alone."""

    def delta(self, base_weight: torch.Tensor | None = None, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """ΔW in full: a new tensor that the caller may modify.

        Args:
            base_weight: W, any floating dtype. None: ΔW is returned in the shape that the file describes, which may
                have a flattened kernel, (out, in * height * width).
            dtype: The dtype of ΔW and of the arithmetic.

        Returns:
            ΔW, in the shape of `base_weight`.

        Raises:
            AdapterError: `base_weight` is needed and missing, or has another shape than this change is for.
        """

    def bias(self, dtype: torch.dtype = torch.float32) -> torch.Tensor | None:
        """The change of the bias, (out,), a new tensor; None if the bias stays."""

    def scaled(self, weight: float) -> Self:
        """The delta at another weight: what LyCORIS computes with `weight` as its multiplier."""

    def to(self, dtype: torch.dtype | None) -> Self:
        """The same delta with its tensors in another dtype; None keeps them."""

    def fits(self, weight_shape: tuple[int, ...]) -> bool:
        """Whether it is for a weight of this shape; the 2-D and the 4-D shape of a 1x1 convolution are the same."""

    def is_finite(self) -> bool:
        """Whether no number in its tensors is NaN or infinite."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors as files have them.

        Returns:
            Tensors by the ends of their keys in the files of LyCORIS and kohya ("lora_up.weight", "alpha").

        Raises:
            AdapterError: It was scaled, and files of this kind cannot store a weight.
        """


@dataclass(frozen=True, eq=False, repr=False)
class TensorDelta:
    """What the kinds share: everything that follows from their tensors and their multiplier.

    A kind has its tensors as fields and defines `shape`, `_dense` and `tensors`.
    """

    kind: ClassVar[str]

    multiplier: float = field(default=1.0, kw_only=True)

    def __repr__(self) -> str:
        rank = "" if self.rank is None else f"rank {self.rank}, "
        return f"{type(self).__name__}({rank}for {self._made_for})"

    @property
    def rank(self) -> int | None:
        """The rank of its factors; None for a kind without one."""
        return None

    @property
    def needs_base(self) -> bool:
        """Whether ΔW depends on W."""
        return False

    @property
    def changes_weight(self) -> bool:
        """Whether it changes the weight, and not the bias alone."""
        return True

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of ΔW as the file describes it."""
        raise NotImplementedError

    @property
    def out_in(self) -> tuple[int, int] | None:
        """Output channels, and input channels (times the kernel, where it is flattened); None for a vector."""
        return (self.shape[0], self.shape[1]) if len(self.shape) > 1 else None

    @property
    def _made_for(self) -> str:
        return f"a weight of {list(self.shape)}"

    def _dense(self, base_weight: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        """ΔW, in any shape with as many elements as W; a new tensor."""
        raise NotImplementedError

    def delta(self, base_weight: torch.Tensor | None = None, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """ΔW in full; see `Delta.delta`."""
        if base_weight is None:
            if self.needs_base:
                kind = with_article(self.kind)
                raise AdapterError(f"the change that {kind} module makes depends on the model's weight: pass it")
            return self._dense(None, dtype).reshape(self.shape)
        if not self.fits(tuple(base_weight.shape)):
            raise AdapterError(f"made for {self._made_for}, but the model's is {list(base_weight.shape)}")
        return self._dense(base_weight, dtype).reshape(base_weight.shape)

    def bias(self, dtype: torch.dtype = torch.float32) -> torch.Tensor | None:
        """The change of the bias; most kinds leave it."""
        return None

    def scaled(self, weight: float) -> Self:
        """The delta at another weight."""
        return replace(self, multiplier=self.multiplier * weight)

    def to(self, dtype: torch.dtype | None) -> Self:
        """The same delta with its tensors in another dtype; None keeps them."""
        if dtype is None:
            return self
        tensors: dict[str, Any] = {name: tensor.to(dtype) for name, tensor in tensor_fields(self).items()}
        return replace(self, **tensors)

    def fits(self, weight_shape: tuple[int, ...]) -> bool:
        """Whether it is for a weight of this shape."""
        return without_ones(self.shape) == without_ones(weight_shape)

    def is_finite(self) -> bool:
        """Whether no number in its tensors is NaN or infinite."""
        return all(finite(tensor) for tensor in tensor_fields(self).values())

    def tensors(self) -> dict[str, torch.Tensor]:
        """Its tensors by the ends of their keys in a file."""
        raise NotImplementedError

    def _check_floating(self) -> None:
        for name, tensor in tensor_fields(self).items():
            if not tensor.is_floating_point():
                raise AdapterError(f"{name} must be floating point, not {tensor.dtype}")

    def _check_unscaled(self) -> None:
        if self.multiplier != 1:
            raise AdapterError(
                f"{with_article(self.kind)} at weight {self.multiplier:g} cannot be written: "
                "files of this kind have no place for a weight"
            )


def with_tensors(change: Any, take: Callable[[str, torch.Tensor], torch.Tensor], prefix: str = "") -> Any:
    """A copy of a change with other tensors, including those of the changes inside of it.

    Args:
        change: A delta.
        take: Called with the name of each field and its tensor; returns the new tensor, of the same shape and also
            floating point: nothing is checked again. Fields of an inner change are named `<field>_<inner field>`,
            those of the parts of a sum `parts_<number>_<field>`.
        prefix: Is put before all names.

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
    """The tensors of a delta, by the names of their fields; not those of a delta inside of it."""
    values = ((item.name, getattr(delta, item.name)) for item in fields(delta))
    return {name: value for name, value in values if isinstance(value, torch.Tensor)}


def with_article(kind: str) -> str:
    """ "a LoRA", "an IA3": the kind in a sentence."""
    return f"an {kind}" if kind in ("IA3", "OFT") else f"a {kind}"


def without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape without a 1x1 kernel, so that a 1x1 convolution and a linear layer compare equal."""
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return tuple(shape)


def check_shape(name: str, tensor: torch.Tensor, *allowed: tuple[int | None, ...]) -> None:
    """AdapterError if the tensor has none of these shapes; None in a shape is any size but 0."""
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
    """AdapterError unless the tensor is (rows, columns) or (rows, columns, 1, 1); None is any size but 0."""
    check_shape(name, tensor, (rows, columns), (rows, columns, 1, 1))


def alpha_in(change: Delta) -> float | None:
    """The alpha of a change, or of the change inside of a DoRA or `WithBias`; None for a kind without alpha."""
    inner = getattr(change, "change", None)
    return getattr(change, "alpha", None) if inner is None else alpha_in(inner)


# --- reading and writing a module's tensors --------------------------------------------------------------------------


def check_suffixes(kind: str, tensors: Tensors, required: Iterable[str], optional: Iterable[str] = ()) -> None:
    """AdapterError, with their names, if tensors of a kind are missing or do not belong to it."""
    required = tuple(required)
    if missing := [name for name in required if name not in tensors]:
        names = ", ".join(sorted(tensors))
        raise AdapterError(f"{with_article(kind)} module without {', '.join(missing)}: it has only {names}")
    if unknown := sorted(set(tensors) - {*required, *optional}):
        raise AdapterError(f"{', '.join(unknown)} cannot be read in {with_article(kind)} module")


def scalar_of(name: str, tensor: torch.Tensor) -> float:
    """The value of a tensor whose elements are all equal; AdapterError for other tensors, NaN and infinity."""
    if tensor.numel() == 0 or bool((tensor != tensor.flatten()[0]).any() and not tensor.isnan().any()):
        raise AdapterError(f"{name} has the shape {list(tensor.shape)}, expected one number")
    value = float(tensor.flatten()[0])
    if not math.isfinite(value):
        raise AdapterError(f"{name} is {value}")
    return value


def alpha_of(tensors: Tensors, rank: int) -> float:
    """A module's alpha; one that is missing or 0 means the rank, as in kohya's and LyCORIS' code."""
    return (scalar_of("alpha", tensors["alpha"]) if "alpha" in tensors else 0.0) or float(rank)


def times(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    """The tensor times a number, computed in float32, in its own dtype; the tensor itself for 1."""
    return tensor if factor == 1 else tensor.to(torch.float32, copy=True).mul_(factor).to(tensor.dtype)


def present(**tensors: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Those tensors that are there."""
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}
