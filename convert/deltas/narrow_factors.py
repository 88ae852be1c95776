"""Factors of low-rank changes in a narrower dtype, without underflow of small values.

float16 has 11 bits of precision down to 6e-5, fewer below, and none below 6e-8. If one factor contains a small scale
(alpha / rank and a merge ratio), its values can fall below this range while the other factor is far above it. Then each
component of one factor can be multiplied by a power of two and that of the other divided by it: up · down is the same.
"""

import math

import torch

_TARGET = -2  # log2 of a factor's largest value: values down to 1/4096 of it then keep full precision in float16
_FAR = 4  # components with a mean of at least this many times the smallest normal number lose almost nothing


def widened(factor: torch.Tensor) -> torch.Tensor:
    """The factor in float32; float64 is kept."""
    return factor if factor.dtype == torch.float64 else factor.to(torch.float32)


def loses(factor: torch.Tensor, dtype: torch.dtype, dim: int) -> bool:
    """Whether a component of a factor would lose more than rounding in `dtype`; `dim` indexes the components."""
    narrow, before = torch.finfo(dtype), torch.finfo(factor.dtype)
    if narrow.tiny <= before.tiny and narrow.max >= 0.9 * before.max:  # bfloat16's max is 0.4 % below float32's
        return False
    wide = widened(factor)
    over = tuple(other for other in range(factor.ndim) if other != dim)
    if factor.numel() == 0:
        return False
    sums = wide.abs().sum(over)
    lowest, highest = wide.aminmax()
    far = float(sums.min()) >= _FAR * narrow.tiny * factor.numel() / factor.shape[dim]
    if far and max(-float(lowest), float(highest)) <= narrow.max:
        return False  # subnormal values lose less than the rounding of all others
    lost = (wide - factor.to(dtype).to(wide.dtype)).abs_().sum(over)
    return not bool((lost <= sums * (narrow.eps * 0.51)).all())  # also True for NaN and infinite values


def balanced(down: torch.Tensor, up: torch.Tensor, shift: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rescale both factors so that they have about the same largest value in each component.

    The product stays the same, apart from `shift`. The factors are multiplied by powers of two, without rounding.

    Args:
        down: (rank, ...), float32 or float64.
        up: (out, rank, ...), float32 or float64.
        shift: Multiply each factor by 2^shift too, and thus the product by 2^(2 · shift).

    Returns:
        The new down and up.
    """
    exponents = _exponents(down, up)
    by_down = [math.ldexp(1.0, shift - exponent) for exponent in exponents]
    by_up = [math.ldexp(1.0, shift + exponent) for exponent in exponents]
    down_factor = torch.tensor(by_down, dtype=down.dtype).reshape(-1, *(1 for _ in down.shape[1:]))
    up_factor = torch.tensor(by_up, dtype=up.dtype).reshape(1, -1, *(1 for _ in up.shape[2:]))
    return down * down_factor.to(down.device), up * up_factor.to(up.device)


def _exponents(down: torch.Tensor, up: torch.Tensor) -> list[int]:
    """For each component, the exponent of the power of two to multiply `up` by and divide `down` by."""
    exponents = []
    for low, high in zip(_largest(down, 0), _largest(up, 1), strict=True):
        usable = low > 0 and high > 0 and math.isfinite(low) and math.isfinite(high)
        exponents.append(round((math.log2(low) - math.log2(high)) / 2) if usable else 0)
    return exponents


def _largest(factor: torch.Tensor, dim: int) -> list[float]:
    return factor.abs().amax(tuple(other for other in range(factor.ndim) if other != dim)).tolist()


def headroom(down: torch.Tensor, up: torch.Tensor, dtype: torch.dtype) -> tuple[int, int]:
    """How many times both balanced factors can be doubled in `dtype`, and how many doublings reach `_TARGET`."""
    largest = max(max(_largest(down, 0)), max(_largest(up, 1)))
    if largest == 0 or not math.isfinite(largest):
        return 1 << 10, 0
    power = math.ceil(math.log2(largest))
    return int(math.log2(torch.finfo(dtype).max)) - 1 - power, max(_TARGET - power, 0)
