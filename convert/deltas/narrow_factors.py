"""Factors of low-rank changes in a narrower dtype, without losing small numbers to its subnormal ones.

float16 has 11 bits down to 6e-5 and fewer below, none at 6e-8. A factor that carries a small scale alone (alpha / rank
and a ratio of a merge) falls below that while the other factor is far above: up · down is the same with each component
of one multiplied by a power of two and of the other divided by it.
"""

import math

import torch

_TARGET = -2  # largest number of a factor, as a power of two: numbers down to 1/4096 of it keep all bits in float16
_FAR = 4  # a component whose mean is this many times the smallest normal number loses almost nothing


def widened(factor: torch.Tensor) -> torch.Tensor:
    """In float32; float64 stays."""
    return factor if factor.dtype == torch.float64 else factor.to(torch.float32)


def loses(factor: torch.Tensor, dtype: torch.dtype, dim: int) -> bool:
    """Whether a component of a factor loses more than rounding in `dtype`; dim is that of the components."""
    narrow, before = torch.finfo(dtype), torch.finfo(factor.dtype)
    if narrow.tiny <= before.tiny and narrow.max >= 0.9 * before.max:  # bfloat16's end is 0.4 % below float32's
        return False
    wide = widened(factor)
    over = tuple(other for other in range(factor.ndim) if other != dim)
    if factor.numel() == 0:
        return False
    sums = wide.abs().sum(over)
    lowest, highest = wide.aminmax()
    far = float(sums.min()) >= _FAR * narrow.tiny * factor.numel() / factor.shape[dim]
    if far and max(-float(lowest), float(highest)) <= narrow.max:
        return False  # what the subnormal numbers among them lose is less than what all others do
    lost = (wide - factor.to(dtype).to(wide.dtype)).abs_().sum(over)
    return not bool((lost <= sums * (narrow.eps * 0.51)).all())  # NaN and infinite numbers are a loss too


def balanced(down: torch.Tensor, up: torch.Tensor, shift: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors with the same product, whose largest numbers are equal in each component, times 2^shift each.

    The factors are multiplied by powers of two, so nothing is rounded.

    Args:
        down: (rank, ...), float32 or float64.
        up: (out, rank, ...), float32 or float64.
        shift: Multiplies the product by 2^(2 · shift).

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
    """For each component the power of two that `up` is multiplied by, and `down` divided by."""
    exponents = []
    for low, high in zip(_largest(down, 0), _largest(up, 1), strict=True):
        usable = low > 0 and high > 0 and math.isfinite(low) and math.isfinite(high)
        exponents.append(round((math.log2(low) - math.log2(high)) / 2) if usable else 0)
    return exponents


def _largest(factor: torch.Tensor, dim: int) -> list[float]:
    return factor.abs().amax(tuple(other for other in range(factor.ndim) if other != dim)).tolist()


def headroom(down: torch.Tensor, up: torch.Tensor, dtype: torch.dtype) -> tuple[int, int]:
    """How many times both balanced factors can be doubled in `dtype`, and how often that is wanted (0 or more)."""
    largest = max(max(_largest(down, 0)), max(_largest(up, 1)))
    if largest == 0 or not math.isfinite(largest):
        return 1 << 10, 0
    power = math.ceil(math.log2(largest))
    return int(math.log2(torch.finfo(dtype).max)) - 1 - power, max(_TARGET - power, 0)
