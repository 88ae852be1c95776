"""The Kronecker product that is nearest to a matrix or a kernel.

With the numbers of ΔW (a·c, b·d, ...) rearranged to R (a·b, c·d·...), w1 ⊗ w2 is the outer product of both: the nearest
one is the first component of R's SVD (Van Loan and Pitsianis, "Approximation with Kronecker products", 1993).
"""

import torch

from .dense_svd import best_approximation
from .kronecker import Kronecker
from .rank_choice import fixed
from .svd import Fit

FACTORS = (16, 8, 4, 2, 1)  # tried for a target error, from small files to large ones


def nearest_kronecker(delta: torch.Tensor, factor: int) -> tuple[Kronecker, Fit]:
    """The LoKr whose ΔW is nearest to a change.

    Args:
        delta: (out, in) or (out, in, height, width), float32.
        factor: w1 has the sizes that divide `out` and `in` near `factor`; see `split`.

    Returns:
        The LoKr with two full factors, and its approximation error.
    """
    (rows, height), (columns, width) = (split(side, factor) for side in delta.shape[:2])
    kernel = delta.shape[2:]
    split_up = delta.reshape(rows, height, columns, width, *kernel)
    matrix = split_up.transpose(1, 2).reshape(rows * columns, -1)
    up, down, fit = _first_component(matrix)
    size = float(up.norm()) ** 0.5 or 1.0  # shared by both, so that neither is too small for fp16
    first, second = (up / size).reshape(rows, columns), (down * size).reshape(height, width, *kernel)
    return Kronecker(first.cpu().contiguous(), second.cpu().contiguous(), 1.0), fit


def nearest_within(delta: torch.Tensor, error: float) -> tuple[Kronecker, Fit]:
    """The smallest of the nearest LoKrs with `FACTORS` whose relative error is at most `error`; factor 1 has none."""
    candidates = (nearest_kronecker(delta, factor) for factor in FACTORS)
    return next((change, fit) for change, fit in candidates if fit.error <= error or change.shape == _second(change))


def split(side: int, factor: int) -> tuple[int, int]:
    """Two integers whose product is `side`, the smaller one first.

    The smaller one is `factor` if that divides the side, otherwise the largest divisor below it. This is the split of
    LyCORIS for the sides that models have.

    Args:
        side: The number of rows or columns.
        factor: The largest value of the smaller integer; -1 asks for the two integers that are closest to each other.

    Returns:
        The smaller and the larger integer.

    >>> split(1280, 8), split(1280, -1), split(77, 8)
    ((8, 160), (32, 40), (7, 11))
    """
    most = int(side**0.5) if factor < 1 else min(factor, side)
    small = next(number for number in range(most, 0, -1) if side % number == 0)
    return min(small, side // small), max(small, side // small)


def _second(change: Kronecker) -> tuple[int, ...]:
    assert change.w2 is not None
    return tuple(change.w2.shape)


def _first_component(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Fit]:
    """up (rows, 1) and down (1, columns) of norm 1, the best pair for a matrix that may be long and narrow."""
    if len(matrix) > 1024 or matrix.shape[1] < 4 * len(matrix):
        return best_approximation(matrix, fixed(1), 1)
    start = torch.linalg.eigh(matrix @ matrix.T).eigenvectors[:, -1:]
    down = start.T @ matrix
    down = down / down.norm()
    up = matrix @ down.T
    energy = float(torch.linalg.vector_norm(matrix, dim=1).double().square().sum())
    missing = float(torch.linalg.vector_norm(torch.addmm(matrix, up, down, alpha=-1), dim=1).double().square().sum())
    return up, down, Fit(energy, missing)
