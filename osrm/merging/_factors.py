"""Singular value decompositions of updates that have few directions, from their factors.

All in float64. Directions below `CUT` of the largest singular value are rounding, and left out: in
a rank that is not there every basis would be arbitrary.
"""

import torch
from jaxtyping import Float
from torch import Tensor

CUT = 1e-6
"""The updates are float32 at best."""

Svd = tuple[Float[Tensor, "out k"], Float[Tensor, "k"], Float[Tensor, "k in"]]


def svd(matrix: Float[Tensor, "m n"]) -> Svd:
    """U, σ, Vᵀ of the directions that are there."""
    U, values, Vh = torch.linalg.svd(matrix, full_matrices=False)
    there = values > CUT * values[:1]
    return U[:, there], values[there], Vh[there]


def product_svd(B: Float[Tensor, "out r"], A: Float[Tensor, "r in"]) -> Svd:
    """The same of B A, of r × r matrices only: B = Q R, Aᵀ = P S, and B A = Q (R Sᵀ) Pᵀ."""
    (Q, R), (P, S) = torch.linalg.qr(B), torch.linalg.qr(A.T)
    U, values, Vh = svd(R @ S.T)
    return Q @ U, values, Vh @ P.T


def polar(columns: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
    """U Vᵀ of the SVD U Σ Vᵀ: the nearest orthonormal columns, if these are independent."""
    U, _, Vh = svd(columns)
    return U @ Vh
