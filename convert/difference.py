"""The best low-rank approximation of a full matrix: the difference of two weights.

Large matrices go through a randomised range finder with power iterations (Halko, Martinsson and Tropp, 2011, algorithms
4.4 and 5.1), iterated until the energy that it finds stands still; small ones, and those whose whole spectrum is
needed, through the eigenvectors of their Gram matrix, or an SVD where that is cheap.
"""

import torch

from .rank_choice import RankRule
from .svd import Fit

_DIRECT = 256  # an SVD of a matrix with a side up to this is as fast as anything else
_OVERSAMPLING = 16
_MOST_ITERATIONS = 8
_STANDSTILL = 5e-4  # relative change of the error between two iterations, a tenth of what may be lost


def _gram(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Singular values (descending) and right singular vectors as rows; matrix has at least as many rows as columns."""
    values, vectors = torch.linalg.eigh(matrix.T @ matrix)
    return values.clamp_min(0).sqrt().flip(0), vectors.flip(1).T


def _range_basis(matrix: torch.Tensor, rank: int, energy: float) -> torch.Tensor:
    """Orthonormal columns that hold the best `rank` components of a matrix with squared norm `energy`.

    The starting directions are drawn with a fixed seed: the same models give the same adapter.
    """
    rows, columns = matrix.shape
    size = min(rank + max(_OVERSAMPLING, rank // 4), rows, columns)
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(columns, size, generator=generator).to(matrix)
    basis = torch.linalg.qr(matrix @ sample).Q
    missing = energy
    for iteration in range(_MOST_ITERATIONS):
        projected = matrix.T @ basis  # its singular values are those found so far
        directions, small = torch.linalg.qr(projected)
        basis = torch.linalg.qr(matrix @ directions).Q
        found = float(torch.linalg.svdvals(small)[:rank].double().square().sum())
        before, missing = missing, max(energy - found, 0.0)
        if iteration >= 1 and before - missing <= 2 * _STANDSTILL * missing + 1e-9 * energy:
            break
    return basis


def best_approximation(
    matrix: torch.Tensor, rule: RankRule, most: int | None
) -> tuple[torch.Tensor, torch.Tensor, Fit]:
    """up (rows, k) and down (k, columns), down with orthonormal rows, and how well up · down meets the matrix.

    rule: chooses k from the singular values; most: the largest k that it can choose, None where that is not known.
    """
    rows, columns = matrix.shape
    energy = _norm_squared(matrix)
    shorter = min(rows, columns)
    if shorter <= _DIRECT:
        u, values, vh = torch.linalg.svd(matrix, full_matrices=False)
        up = u * values
    elif most is None or 2 * most >= shorter:
        if rows >= columns:
            values, vh = _gram(matrix)
            up = matrix @ vh.T
        else:
            values, left = _gram(matrix.T)
            vh, up = left @ matrix / values.clamp_min(1e-30)[:, None], left.T * values
    else:
        basis = _range_basis(matrix, most, energy)
        small = basis.T @ matrix
        u, values, vh = torch.linalg.svd(small, full_matrices=False)
        up = (basis @ u) * values
    rank = rule(values)
    up, down = up[:, :rank], vh[:rank]
    missing = energy - float(values[:rank].double().square().sum())
    if missing < 1e-3 * energy:  # the difference of two large numbers: measure it instead
        missing = _norm_squared(torch.addmm(matrix, up, down, alpha=-1))
    return up, down, Fit(energy, missing)


def _norm_squared(matrix: torch.Tensor) -> float:
    """‖matrix‖², summed row by row in float64."""
    return float(torch.linalg.vector_norm(matrix, dim=1).double().square().sum())
