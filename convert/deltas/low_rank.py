"""`LowRank`: the low-rank weight change of one module."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from lora_adapters.convert.errors import AdapterError, UnknownFormatError

from .narrow_factors import balanced, headroom, loses, widened

Key = TypeVar("Key")
RANK_SCALINGS = {"constant": 0.0, "rank": 1.0, "sqrt": 0.5}  # the exponent in the scale alpha/R · (R/rank)^exponent
RANK_SAMPLINGS = ("uniform", "spread")


def finite(factor: torch.Tensor) -> bool:
    """Whether all values are finite; tests their sum, which needs no temporary tensor of flags."""
    return math.isfinite(float(factor.sum(dtype=torch.float32)))


def with_alpha(tensors: dict[str, torch.Tensor], alpha: float, rank: int, factor: str) -> dict[str, torch.Tensor]:
    """Add the tensor `alpha` to the tensors of a module, as it is stored in files.

    It has the dtype of `tensors[factor]`, or float32 if that dtype would round it. Programs that read the file replace
    an alpha of 0 by the rank. So if alpha is 0 in float32, the rank is written and `tensors[factor]` is set to zeros.

    Args:
        tensors: The tensors of a module, by the suffix of their key.
        alpha: The alpha.
        rank: The rank of the module.
        factor: The key of the factor that decides the dtype.

    Returns:
        The tensors with `alpha` first.

    Raises:
        AdapterError: alpha is too large for float32.
    """
    if float(torch.tensor(alpha, dtype=torch.float32)) == 0:
        tensors, alpha = {**tensors, factor: torch.zeros_like(tensors[factor])}, float(rank)
    written = torch.tensor(alpha, dtype=tensors[factor].dtype)
    if float(written) != alpha:
        written = torch.tensor(alpha, dtype=torch.float32)
    if math.isinf(float(written)):  # torch.isinf is not implemented for 8-bit dtypes
        raise AdapterError(f"alpha {alpha:g} is too large to be written")
    return {"alpha": written, **tensors}


@dataclass(frozen=True, eq=False, repr=False)
class LowRank:
    """ΔW = (alpha / rank) · up · down for one linear layer or convolution (LoRA, arXiv:2106.09685, section 4.1).

    `down` is (rank, in) or (rank, in, height, width), `up` is (out, rank) or (out, rank, 1, 1). For a linear layer or
    1x1 convolution, the 2-D and the 4-D shapes are equivalent. Shapes that do not match raise AdapterError.

    >>> one = LowRank(down=torch.ones(2, 3), up=torch.ones(5, 2), alpha=1.0)
    >>> one.rank, one.scale, one.out_in, one.delta()[0, 0].item()
    (2, 0.5, (5, 3), 1.0)
    """

    down: torch.Tensor
    up: torch.Tensor
    alpha: float

    def __post_init__(self) -> None:
        down, up = tuple(self.down.shape), tuple(self.up.shape)
        if len(down) == len(up) and len(down) in (3, 5):
            raise UnknownFormatError(
                f"down {list(down)} and up {list(up)} belong to a {len(down) - 2}D convolution, which is not supported"
            )
        if len(down) not in (2, 4) or len(up) not in (2, 4) or math.prod(up[2:]) != 1:
            raise AdapterError(f"down {list(down)} and up {list(up)} are not a low-rank pair")
        if up[1] != down[0] or down[0] == 0:
            raise AdapterError(f"ranks differ or are 0: down {list(down)} has {down[0]}, up {list(up)} has {up[1]}")
        if not (self.down.is_floating_point() and self.up.is_floating_point()):
            raise AdapterError(f"weights must be floating point, not {self.down.dtype} and {self.up.dtype}")
        if not math.isfinite(self.alpha):
            raise AdapterError(f"alpha is {self.alpha}")

    def __repr__(self) -> str:
        return f"LowRank(rank {self.rank}, alpha {self.alpha:g}, {list(self.down.shape)} -> {self.up.shape[0]})"

    @property
    def kind(self) -> str:
        """ "LoRA", the name shown to users."""
        return "LoRA"

    @property
    def needs_base(self) -> bool:
        """False: ΔW does not depend on the weight."""
        return False

    @property
    def changes_weight(self) -> bool:
        """True: a low-rank pair always changes the weight."""
        return True

    @property
    def rank(self) -> int:
        """The number of components."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank

    @property
    def kernel(self) -> tuple[int, int]:
        """Height and width of the convolution; (1, 1) for a linear layer."""
        return (self.down.shape[2], self.down.shape[3]) if self.down.ndim == 4 else (1, 1)

    @property
    def out_in(self) -> tuple[int, int]:
        """Output and input channels."""
        return self.up.shape[0], self.down.shape[1]

    def matrices(self, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
        """`up` as (out, rank) and `down` as (rank, in·height·width)."""
        return self.up.to(dtype).flatten(1), self.down.to(dtype).flatten(1)

    def delta(
        self, base_weight: torch.Tensor | torch.dtype | None = None, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """ΔW as a dense tensor.

        Args:
            base_weight: The base model's weight, of which only the shape is used; or the dtype.
            dtype: The dtype of ΔW and of the arithmetic.

        Returns:
            (out, in) or (out, in, height, width); the shape of `base_weight` if given.

        Raises:
            AdapterError: The change does not fit a weight of this shape.
        """
        if isinstance(base_weight, torch.dtype):
            dtype, base_weight = base_weight, None
        change = self if base_weight is None else self.shaped_like(tuple(base_weight.shape))
        up, down = change.matrices(dtype)
        return (up @ down).mul_(self.scale).reshape(len(up), *change.down.shape[1:])

    def fits(self, weight_shape: tuple[int, ...]) -> bool:
        """Whether ΔW fits a weight of this shape; 2-D and 4-D shapes of a 1x1 convolution are equivalent."""
        return (*self.out_in, *self.kernel) == (*weight_shape, 1, 1)[:4]

    def shaped_like(self, weight_shape: tuple[int, ...]) -> "LowRank":
        """The same change with as many dimensions as the weight; AdapterError if it does not fit the weight."""
        if not self.fits(weight_shape):
            shape = [*self.out_in, *self.kernel][: 4 if self.kernel != (1, 1) else 2]
            raise AdapterError(f"made for a weight of {shape}, but the model's weight is {list(weight_shape)}")
        extra = (1, 1) if len(weight_shape) == 4 else ()
        down = self.down.reshape(self.rank, *weight_shape[1:])
        return replace(self, down=down, up=self.up.reshape(*self.up.shape[:2], *extra))

    def scaled(self, weight: float) -> "LowRank":
        """The change times `weight`: the same factor tensors with another alpha."""
        return replace(self, alpha=self.alpha * weight)

    def with_alpha(self, alpha: float) -> "LowRank":
        """The same ΔW with another alpha: `up` is rescaled, or both factors if small values of `up` would underflow.

        Args:
            alpha: The new alpha, not 0.

        Returns:
            The pair, with factors in the same dtypes (but float16 for an `up` in float8).

        Raises:
            AdapterError: alpha is 0.
        """
        if alpha == 0:
            raise AdapterError("alpha must not be 0: scale the adapter by 0 instead")
        factor = self.alpha / alpha
        if factor == 1:
            return self
        dtype = self.up.dtype if self.up.dtype.itemsize > 1 else torch.float16  # rounding to float8 loses up to 10 %
        up = self.up.float() * factor
        if not loses(up, dtype, 1):
            return replace(self, up=up.to(dtype), alpha=alpha)
        down, up = balanced(self.down.float(), up)
        return replace(self, down=down.to(self.down.dtype), up=up.to(dtype), alpha=alpha)

    def without_alpha(self) -> "LowRank":
        """The same ΔW with alpha = rank, so that the scale is 1; a pair with alpha 0 is returned unchanged."""
        return self.with_alpha(float(self.rank)) if self.alpha else self

    def truncated(self, rank: int, rank_scaling: str = "constant") -> "LowRank":
        """Keep only the first components, as DyLoRA does.

        Args:
            rank: The number of components to keep. If it is at least R, the rank of this pair, all are kept.
            rank_scaling: "constant" keeps the scale alpha/R that the components were trained with; "rank" keeps alpha,
                so that the scale is alpha/rank as in the DyLoRA paper (arXiv:2210.07558) and in kohya's splitter;
                "sqrt" is in between: alpha/R · √(R/rank).

        Returns:
            The truncated pair.

        Raises:
            AdapterError: The rank is below 1.
        """
        if rank >= self.rank:
            return self
        if rank < 1:
            raise AdapterError(f"rank must be between 1 and {self.rank}, got {rank}")
        alpha = self.alpha * (rank / self.rank) ** (1 - RANK_SCALINGS[rank_scaling])
        return LowRank(self.down[:rank].clone(), self.up[:, :rank].clone().contiguous(), alpha)

    def reordered(self, order: torch.Tensor) -> "LowRank":
        """The same change with permuted components; `order` is (rank,) and contains each index once."""
        return replace(self, down=self.down[order], up=self.up[:, order])

    def to(self, dtype: torch.dtype | None) -> "LowRank":
        """The same change with factors in another dtype.

        If small values of a factor would underflow, both factors are balanced first: each component of one factor is
        multiplied by a power of two, and the same component of the other factor is divided by it.

        Args:
            dtype: The new dtype; None returns the pair unchanged.

        Returns:
            The pair.
        """
        return self if dtype is None else self._to(dtype, self.loses(dtype))

    def _to(self, dtype: torch.dtype, balance: bool) -> "LowRank":
        down, up = balanced(*_wide(self)) if balance else (self.down, self.up)
        return replace(self, down=down.to(dtype), up=up.to(dtype))

    def loses(self, dtype: torch.dtype) -> bool:
        """Whether values of a factor would underflow or overflow in a dtype, which loses more than rounding does."""
        return loses(self.down, dtype, 0) or loses(self.up, dtype, 1)

    def is_finite(self) -> bool:
        """Whether all values in the factors are finite."""
        return finite(self.down) and finite(self.up)

    def bias(self, dtype: torch.dtype = torch.float32) -> None:
        """None: the bias does not change."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """`lora_down.weight`, `lora_up.weight` and `alpha`; see `deltas.Delta`."""
        tensors = {"lora_down.weight": self.down, "lora_up.weight": self.up}
        return with_alpha(tensors, self.alpha, self.rank, "lora_up.weight")

    def __add__(self, other: "LowRank") -> "LowRank":
        """The sum of both changes; see `add_up`."""
        return add_up([self, other])


def _wide(pair: LowRank) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors, down and up, in at least float32."""
    return widened(pair.down), widened(pair.up)


def to_narrow(pairs: Mapping[Key, LowRank], dtype: torch.dtype, keep_alpha: bool = False) -> dict[Key, LowRank]:
    """Convert all pairs of an adapter to another dtype; see `LowRank.to`.

    If small values would underflow even in balanced factors, the factors of all modules are multiplied by a power of
    two and every alpha is divided by its square. Programs that use one alpha for all modules then still read the same
    change.

    Args:
        pairs: The pairs, by any key.
        dtype: The new dtype.
        keep_alpha: Do not change any alpha.

    Returns:
        The new pairs, by the same keys.
    """
    losing = {key for key, pair in pairs.items() if pair.loses(dtype)}
    narrow = {key: pair._to(dtype, key in losing) for key, pair in pairs.items()}
    low = [] if keep_alpha else [balanced(*_wide(pairs[key])) for key in losing]
    low = [(down, up) for down, up in low if loses(down, dtype, 0) or loses(up, dtype, 1)]
    if not low:
        return narrow
    enough = max(headroom(*factors, dtype)[1] for factors in low)
    shift = min([enough, *(headroom(*balanced(*_wide(pair)), dtype)[0] for pair in pairs.values())])
    if shift <= 0:
        return narrow
    shifted = {}
    for key, pair in pairs.items():
        down, up = balanced(*_wide(pair), shift)
        alpha = math.ldexp(pair.alpha, -2 * shift)
        shifted[key] = replace(pair, down=down.to(dtype), up=up.to(dtype), alpha=alpha)
    return shifted


def add_up(parts: Sequence[LowRank], scale: float | None = None) -> LowRank:
    """The exact sum of changes, made by concatenating their components.

    Args:
        parts: At least one pair.
        scale: alpha / rank of the sum; None takes the largest scale of the parts. Each part's `up` is rescaled to it.

    Returns:
        The sum in float32, with as many dimensions as the first part; a single part is returned unchanged.

    Raises:
        AdapterError: The parts are for weights of different shapes.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    for part in parts[1:]:
        if (part.out_in, part.kernel) != (first.out_in, first.kernel):
            shapes = [[*pair.out_in, *pair.kernel] for pair in (first, part)]
            raise AdapterError(f"weight shapes differ: one change is for {shapes[0]}, another for {shapes[1]}")
    shape = (first.up.shape[0], *first.down.shape[1:])
    alike = [part.shaped_like(shape) for part in parts]
    scale = scale or common_scale(alike)
    up = torch.cat([part.up.float() * (part.scale / scale) for part in alike], dim=1)
    return LowRank(torch.cat([part.down.float() for part in alike]), up, scale * up.shape[1])


def common_scale(parts: Iterable[LowRank]) -> float:
    """The largest absolute value of alpha / rank, for `add_up`; 1 if all are 0."""
    return max((abs(part.scale) for part in parts), default=0.0) or 1.0


def rank_range(ranks: Iterable[int]) -> str:
    """Format the ranks of the modules of an adapter.

    Args:
        ranks: The rank of each module, in any order.

    Returns:
        The rank if all are equal, otherwise the lowest and the highest.

    >>> rank_range([16, 16]), rank_range([16, 8, 36]), rank_range([])
    ('16', '8 to 36', '0')
    """
    different = sorted(set(ranks)) or [0]
    return str(different[0]) if len(different) == 1 else f"{different[0]} to {different[-1]}"
