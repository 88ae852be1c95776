"""Sampling the ranks that a DyLoRA trains in a step."""

import math
import random
from bisect import bisect
from functools import lru_cache
from itertools import accumulate

# The best distribution in the rank study, for unsorted and for sorted components: the shares of ranks are proportional
# to b**-power, and the full rank gets an additional share `full` of the samples.
_POWER_AND_FULL = {False: (1.0, 1 / 8), True: (1.5, 0.3)}
_GOLDEN = (math.sqrt(5) - 1) / 2


@lru_cache
def _shares(ranks: tuple[int, ...], sorted_components: bool) -> list[float]:
    """The cumulative shares of the ranks, without the additional share of the full rank."""
    power, full = _POWER_AND_FULL[sorted_components]
    weights = [rank**-power for rank in ranks]
    return list(accumulate((1 - full) * weight / sum(weights) for weight in weights))


def ranks_of_step(
    ranks: tuple[int, ...],
    sampling: str,
    seed: int,
    step: int,
    samples: range = range(1),
    total: int = 1,
    sorted_components: bool = False,
) -> list[int]:
    """The rank of each sample in a training step, which depends on the arguments alone.

    Args:
        ranks: The adapter's ranks, ascending.
        sampling: "uniform": each rank is equally likely and the same for all samples, as in the DyLoRA paper
            (arXiv:2210.07558). "spread": each sample has its own rank, spread evenly over a distribution that prefers
            low ranks and the highest, so that a larger batch trains low, middle and full ranks in every step; in small
            batches, neighbouring steps complete each other (a golden-ratio sequence).
        seed: The seed of the run.
        step: The number of the step.
        samples: The indices of this process' samples in the batch.
        total: The number of samples in the batch of all processes.
        sorted_components: Whether the components have been sorted in this training; "spread" then prefers the lowest
            ranks and the highest rank even more.

    Returns:
        One rank for each of `samples`.

    >>> ranks_of_step((4, 8, 12, 16), "uniform", seed=0, step=1, samples=range(3), total=3)
    [16, 16, 16]
    >>> ranks_of_step((4, 8, 12, 16), "spread", seed=0, step=1, samples=range(6), total=6)
    [16, 12, 16, 4, 4, 8]
    """
    drawn = random.Random(f"{seed}/{step}")
    if sampling == "uniform":
        return [drawn.choice(ranks)] * len(samples)
    offset = (random.Random(str(seed)).random() + step * _GOLDEN) % 1
    places = drawn.sample(range(total), total)
    shares = _shares(ranks, sorted_components)
    return [ranks[min(bisect(shares, (places[sample] + offset) / total), len(ranks) - 1)] for sample in samples]
