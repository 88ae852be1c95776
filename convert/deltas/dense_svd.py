"""The best low-rank approximation of a full matrix: the difference of two weights.

Large matrices go through a randomised range finder with power iterations (Halko, Martinsson and Tropp, 2011, algorithms
4.4 and 5.1), iterated until the energy that it finds converges; small ones, and those whose whole spectrum is
needed, through the eigenvectors of their Gram matrix, or an SVD where that is cheap.
"""

import torch

from .orthonormal import gram_svd, orthonormal
from .rank_choice import RankRule
from .svd import Fit

_DIRECT = 256  # an SVD of a matrix with a side up to this is as fast as anything else
_OVERSAMPLING = 16
_MOST_ITERATIONS = 8
_STANDSTILL = 1e-3  # relative change of the error between two iterations, a fifth of what may be lost


def _gram(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Singular values (descending) and right singular vectors as rows; matrix has at least as many rows as columns."""
    values, vectors = torch.linalg.eigh(matrix.T @ matrix)
    return values.clamp_min(0).sqrt().flip(0), vectors.flip(1).T


def _range_finder(matrix: torch.Tensor, rank: int, energy: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The largest singular values of a matrix with squared norm `energy`, enough for `rank`; U·S and Vᵀ of them.

    The starting directions are drawn with a fixed seed: the same models give the same adapter.
    """
    rows, columns = matrix.shape
    size = min(rank + max(_OVERSAMPLING, rank // 4), rows, columns)
    generator = torch.Generator().manual_seed(0)
    sample = matrix @ torch.randn(columns, size, generator=generator).to(matrix)
    missing = energy
    for _ in range(_MOST_ITERATIONS):
        basis = orthonormal(sample)[0].to(matrix.dtype)
        # The singular values of matrixᵀ · basis are those found so far; its directions start the next iteration.
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
        most: The largest k that the rule can choose; None if that is not known. A small one is faster.
        direct: Use LAPACK's SVD, which gives singular vectors the signs that kohya's tools have; see
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
        kept = values > 1e-7 * values[0]  # below is rounding, and dividing by it would give numbers beyond float16
        values, left = values[kept], left[kept]
        up, vh = left.T * values, left @ matrix / values[:, None]
    rank = rule(values)
    up, down = up[:, :rank], vh[:rank]
    missing = energy - float(values[:rank].double().square().sum())
    if missing < 1e-3 * energy:  # the difference of two large numbers: measure it instead
        missing = _norm_squared(torch.addmm(matrix, up, down, alpha=-1))
    return up, down, Fit(energy, missing)


def _norm_squared(matrix: torch.Tensor) -> float:
    """‖matrix‖², summed row by row in float64."""
    return float(torch.linalg.vector_norm(matrix, dim=1).double().square().sum())
