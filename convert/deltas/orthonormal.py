"""Orthonormal bases and singular values from Gram matrices.

They need products in float64 and a small symmetric eigenproblem, which is several times faster than a QR decomposition
or an SVD. The results are exact to float32 rounding: directions below it are dropped.
"""

import torch

_NOTHING = 1e-14  # relative to the largest eigenvalue: 1e-7 of the largest singular value, float32's rounding


def orthonormal(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Factor a matrix as basis · root, where the basis has orthonormal columns.

    Args:
        matrix: (rows, columns), float32.

    Returns:
        basis (rows, n) and root (n, columns), float64; n is the numerical rank.
    """
    basis, values, vh = gram_svd(matrix)
    return basis, values[:, None] * vh


def gram_svd(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U (rows, n), singular values (n, descending) and Vᵀ (n, columns) in float64; n is the numerical rank."""
    matrix = matrix.double()
    if matrix.shape[0] < matrix.shape[1]:
        vectors, roots = _directions(matrix @ matrix.T)
        return vectors, roots, (vectors / roots).T @ matrix
    vectors, roots = _directions(matrix.T @ matrix)
    return matrix @ (vectors / roots), roots, vectors.T


def _directions(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvectors (size, n) and square roots of the eigenvalues (n, descending), without rounding noise."""
    values, vectors = torch.linalg.eigh(gram)
    kept = (values > _NOTHING * values[-1:].clamp_min(1e-300)).flip(0)
    return vectors.flip(1)[:, kept], values.flip(0)[kept].sqrt()
