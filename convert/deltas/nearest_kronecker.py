"""The nearest Kronecker product to a matrix or a convolution kernel.

If ΔW (a·c, b·d, ...) is rearranged to a matrix R (a·b, c·d·...), w1 ⊗ w2 becomes the outer product of w1 and w2. The
nearest one is the first component of R's SVD (Van Loan and Pitsianis, "Approximation with Kronecker products", 1993).
"""

import torch

from .dense_svd import best_approximation
from .kronecker import Kronecker
from .rank_choice import fixed
from .svd import Fit

FACTORS = (16, 8, 4, 2, 1)  # tried in this order for a target error: from the smallest file to the largest


def nearest_kronecker(delta: torch.Tensor, factor: int) -> tuple[Kronecker, Fit]:
    """The LoKr whose ΔW is nearest to a given change.

    Args:
        delta: (out, in) or (out, in, height, width), float32.
        factor: The wanted size of w1: its sides are divisors of `out` and `in` near `factor`; see `split`.

    Returns:
        The LoKr with two full factors, and its approximation error.
    """
    (rows, height), (columns, width) = (split(side, factor) for side in delta.shape[:2])
    kernel = delta.shape[2:]
    split_up = delta.reshape(rows, height, columns, width, *kernel)
    matrix = split_up.transpose(1, 2).reshape(rows * columns, -1)
    up, down, fit = _first_component(matrix)
    size = float(up.norm()) ** 0.5 or 1.0  # split the norm evenly, so that neither factor is too small for fp16
    first, second = (up / size).reshape(rows, columns), (down * size).reshape(height, width, *kernel)
    return Kronecker(first.cpu().contiguous(), second.cpu().contiguous(), 1.0), fit


def nearest_within(delta: torch.Tensor, error: float) -> tuple[Kronecker, Fit]:
    """The smallest LoKr, of those for `FACTORS`, whose relative error is at most `error`; factor 1 is exact."""
    candidates = (nearest_kronecker(delta, factor) for factor in FACTORS)
    return next((change, fit) for change, fit in candidates if fit.error <= error or change.shape == _second(change))


def split(side: int, factor: int) -> tuple[int, int]:
    """Two integers whose product is `side`, the smaller one first.

    The smaller one is `factor` if it divides `side`, otherwise the largest divisor below `factor`. For the sides that
    occur in models, this is LyCORIS' split.

    Args:
        side: The number of rows or columns.
        factor: The largest value of the smaller integer; -1 chooses the two integers that are closest to each other.

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
    """The best rank-1 approximation: up (rows, 1) and down (1, columns) of norm 1; fast if there are few rows."""
    if len(matrix) > 1024 or matrix.shape[1] < 4 * len(matrix):
        return best_approximation(matrix, fixed(1), 1)
    start = torch.linalg.eigh(matrix @ matrix.T).eigenvectors[:, -1:]
    down = start.T @ matrix
    down = down / down.norm()
    up = matrix @ down.T
    energy = float(torch.linalg.vector_norm(matrix, dim=1).double().square().sum())
    missing = float(torch.linalg.vector_norm(torch.addmm(matrix, up, down, alpha=-1), dim=1).double().square().sum())
    return up, down, Fit(energy, missing)
