"""Orthonormal bases of tall, narrow matrices."""

import torch

_SMALL = 192  # columns up to which the eigenvectors of the Gram matrix are faster than Householder's QR
_NOTHING = 1e-14  # of the largest eigenvalue: 1e-7 of the largest singular value, the rounding of float32


def orthonormal(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """basis (rows, n) with orthonormal columns and root (n, columns), float64, with basis · root = matrix (float32).

    n is the numerical rank. Matrix products in float64 and a small eigenproblem: much faster than a QR decomposition,
    and exact to the rounding of float32, since directions below that are left out.
    """
    matrix = matrix.double()
    rows, columns = matrix.shape
    if columns > min(rows, _SMALL):
        basis, root = torch.linalg.qr(matrix)
        return basis, root
    basis, values, vh = gram_svd(matrix)
    return basis, values[:, None] * vh


def gram_svd(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U (rows, n), singular values (n, descending) and Vᵀ (n, columns) in float64, n the numerical rank of float32."""
    matrix = matrix.double()
    values, vectors = torch.linalg.eigh(matrix.T @ matrix)
    kept = (values > _NOTHING * values[-1].clamp_min(1e-300)).flip(0)
    vectors, roots = vectors.flip(1)[:, kept], values.flip(0)[kept].sqrt()
    return matrix @ (vectors / roots), roots, vectors.T
