"""Rules that choose the rank of one module from its singular values (in descending order)."""

from collections.abc import Callable

import torch

from lora_adapters.convert.choices import DYNAMIC_METHODS
from lora_adapters.convert.errors import AdapterError

RankRule = Callable[[torch.Tensor], int]
_NONE = 1e-6  # if the largest singular value is below this, the module is treated as unchanged


def fixed(rank: int) -> RankRule:
    """Always this rank, or all singular values if there are fewer."""
    if rank < 1:
        raise AdapterError(f"rank must be at least 1, got {rank}")
    return lambda values: min(rank, len(values))


def by_error(target: float, most: int | None = None) -> RankRule:
    """The lowest rank whose relative error (in the Frobenius norm) is at most `target`, limited to `most`."""
    if not 0 <= target < 1:
        raise AdapterError(f"target_error must be at least 0 and below 1, got {target:g}")
    if most is not None:
        fixed(most)

    def choose(values: torch.Tensor) -> int:
        energy = values.double().square()
        # Summed from the smallest value on, to avoid the difference of two large numbers.
        missing = torch.cat([energy.flip(0).cumsum(0).flip(0), energy.new_zeros(1)])
        enough = int((missing <= target**2 * missing[0]).nonzero()[0])
        return min(max(enough, 1), most or len(values), len(values))

    return choose


def dynamic(method: str, parameter: float, most: int) -> RankRule:
    """The rules of kohya's resize_lora since v0.11 (earlier versions keep one component more).

    Args:
        method: "sv_ratio" keeps the singular values above the largest one divided by `parameter`; "sv_cumulative" keeps
            the fewest values whose sum is the share `parameter` of the total; "sv_fro" does so for the Frobenius norm.
        parameter: At least 2 for sv_ratio, 0 to 1 for the other methods.
        most: The largest rank to choose.

    Returns:
        A function that maps the singular values, in descending order, to the rank.

    Raises:
        AdapterError: The method is unknown, or the parameter or `most` is out of range.
    """
    if method not in DYNAMIC_METHODS:
        raise AdapterError(f"unknown dynamic method {method}: choose one of {', '.join(DYNAMIC_METHODS)}")
    if method == "sv_ratio" and parameter < 2:
        raise AdapterError(f"dynamic_param must be at least 2 for sv_ratio, got {parameter:g}")
    if method != "sv_ratio" and not 0 <= parameter <= 1:
        raise AdapterError(f"dynamic_param must be between 0 and 1 for {method}, got {parameter:g}")
    fixed(most)

    def choose(values: torch.Tensor) -> int:
        if float(values[0]) <= _NONE:
            return 1
        values = values.double()
        if method == "sv_ratio":
            count = int((values > values[0] / parameter).sum())
        else:
            power = 1 if method == "sv_cumulative" else 2
            shares = (values**power).cumsum(0)
            count = int(torch.searchsorted(shares / shares[-1], parameter**power)) + 1
        return min(max(count, 1), most, len(values))

    return choose
