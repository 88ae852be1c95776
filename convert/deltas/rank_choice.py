"""How many singular values to keep of one module: rules from its singular values (descending) to a rank."""

from collections.abc import Callable

import torch

from lora_adapters.convert.choices import DYNAMIC_METHODS
from lora_adapters.convert.errors import AdapterError

RankRule = Callable[[torch.Tensor], int]
_NONE = 1e-6  # a largest singular value below this is a module without any change


def fixed(rank: int) -> RankRule:
    """This many, or all where there are fewer."""
    if rank < 1:
        raise AdapterError(f"rank must be at least 1, got {rank}")
    return lambda values: min(rank, len(values))


def by_error(target: float, most: int | None = None) -> RankRule:
    """The fewest whose relative error (Frobenius norm of what is missing, by that of all) is at most `target`."""
    if not 0 <= target < 1:
        raise AdapterError(f"target_error must be at least 0 and below 1, got {target:g}")
    if most is not None:
        fixed(most)

    def choose(values: torch.Tensor) -> int:
        energy = values.double().square()
        # Summed from the small end, so that what is missing is not the difference of two large numbers.
        missing = torch.cat([energy.flip(0).cumsum(0).flip(0), energy.new_zeros(1)])
        enough = int((missing <= target**2 * missing[0]).nonzero()[0])
        return min(max(enough, 1), most or len(values), len(values))

    return choose


def dynamic(method: str, parameter: float, most: int) -> RankRule:
    """The rules of kohya's resize_lora (since v0.11; before, it kept one component more).

    Args:
        method: "sv_ratio" keeps the singular values above the largest one divided by `parameter`; "sv_cumulative" keeps
            the fewest that have this share of the sum, "sv_fro" of the Frobenius norm.
        parameter: At least 2 for sv_ratio, 0 to 1 for the others.
        most: The largest rank to choose.

    Returns:
        A function from the singular values, largest first, to the rank.

    Raises:
        AdapterError: The method is unknown, or the parameter or `most` is out of range.
    """
    if method not in DYNAMIC_METHODS:
        raise AdapterError(f"unknown dynamic method {method}: {', '.join(DYNAMIC_METHODS)} are known")
    if method == "sv_ratio" and parameter < 2:
        raise AdapterError(f"dynamic_param {parameter:g} is too small for sv_ratio: it is 2 or more")
    if method != "sv_ratio" and not 0 <= parameter <= 1:
        raise AdapterError(f"dynamic_param {parameter:g} is too large for {method}: it is between 0 and 1")
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
