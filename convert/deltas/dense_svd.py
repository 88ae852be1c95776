"""The best low-rank approximation of a dense matrix, such as the difference of two weights.

Large matrices use a randomised range finder with power iterations (Halko, Martinsson and Tropp, 2011, algorithms 4.4
and 5.1), iterated until the captured energy converges. Small matrices, and those whose whole spectrum is needed, use
the eigenvectors of their Gram matrix, or an SVD if that is cheap.
"""

import torch

from .orthonormal import gram_svd, orthonormal
from .rank_choice import RankRule
from .svd import Fit

_DIRECT = 256  # up to this length of the shorter side, a plain SVD is as fast as the alternatives
_OVERSAMPLING = 16
_MOST_ITERATIONS = 8
_STANDSTILL = 1e-3  # converged: relative change of the error between two iterations; a fifth of the accepted loss


def _gram(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Singular values (descending) and right singular vectors (as rows); the matrix must not be wider than tall."""
    values, vectors = torch.linalg.eigh(matrix.T @ matrix)
    return values.clamp_min(0).sqrt().flip(0), vectors.flip(1).T


def _range_finder(matrix: torch.Tensor, rank: int, energy: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """At least `rank` of the largest singular values, with U·S and Vᵀ; `energy` is the matrix's squared norm.

    The starting directions are drawn with a fixed seed, so that results are reproducible.
    """
    rows, columns = matrix.shape
    size = min(rank + max(_OVERSAMPLING, rank // 4), rows, columns)
    generator = torch.Generator().manual_seed(0)
    sample = matrix @ torch.randn(columns, size, generator=generator).to(matrix)
    missing = energy
    for _ in range(_MOST_ITERATIONS):
        basis = orthonormal(sample)[0].to(matrix.dtype)
        # The SVD of matrixᵀ · basis gives the singular values found so far and the directions for the next iteration.
        directions, values, vh = gram_svd(matrix.T @ basis)
        before, missing = missing, max(energy - float(values[:rank].square().sum()), 0.0)
        if before - missing <= 2 * _STANDSTILL * missing + 1e-9 * energy:
            break
        sample = matrix @ directions.to(matrix.dtype)
    up = basis @ (vh.T * values).to(matrix.dtype)
    return values, up, directions.T.to(matrix.dtype)


def best_approximation(
    matrix: torch.Tensor, rule: RankRule, most: int | None, direct: bool = False
) -> tuple[torch.Tensor, torch.Tensor, Fit]:
    """The best low-rank approximation of a matrix.

    Args:
        matrix: (rows, columns), float32 or float64.
        rule: Chooses the rank k from the singular values.
        most: The largest k that the rule can choose; None if it is not known. A small value is faster.
        direct: Use LAPACK's SVD, whose singular vectors have the same signs as those of kohya's tools; see
            `svd.decompose_dense`.

    Returns:
        up (rows, k), down (k, columns) with orthonormal rows, and the approximation error of up · down.
    """
    rows, columns = matrix.shape
    energy = _norm_squared(matrix)
    shorter = min(rows, columns)
    if direct or shorter <= _DIRECT:
        u, values, vh = torch.linalg.svd(matrix, full_matrices=False)
        up = u * values
    elif most is not None and 2 * most < shorter:
        values, up, vh = _range_finder(matrix, most, energy)
    elif rows >= columns:
        values, vh = _gram(matrix)
        up = matrix @ vh.T
    else:
        values, left = _gram(matrix.T)
        kept = values > 1e-7 * values[0]  # the rest is rounding error; dividing by it would overflow float16
        values, left = values[kept], left[kept]
        up, vh = left.T * values, left @ matrix / values[:, None]
    rank = rule(values)
    up, down = up[:, :rank], vh[:rank]
    missing = energy - float(values[:rank].double().square().sum())
    if missing < 1e-3 * energy:  # too small for a difference of two large numbers: measure the residual itself
        missing = _norm_squared(torch.addmm(matrix, up, down, alpha=-1))
    return up, down, Fit(energy, missing)


def _norm_squared(matrix: torch.Tensor) -> float:
    """‖matrix‖², summed row by row in float64."""
    return float(torch.linalg.vector_norm(matrix, dim=1).double().square().sum())
