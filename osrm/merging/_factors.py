"""Singular value decompositions of updates of low rank, from their factors in float64."""

import torch
from jaxtyping import Float
from torch import Tensor

CUT = 1e-6
"""Singular values of at most `CUT` times the largest are rounding, as updates are float32 at best.
Their singular vectors are arbitrary, so they are left out."""

Svd = tuple[Float[Tensor, "out k"], Float[Tensor, "k"], Float[Tensor, "k in"]]


def svd(matrix: Float[Tensor, "m n"]) -> Svd:
    """U, σ and Vᵀ of the directions whose singular values are not rounding."""
    U, values, Vh = torch.linalg.svd(matrix, full_matrices=False)
    large = values > CUT * values[:1]
    return U[:, large], values[large], Vh[large]


def product_svd(B: Float[Tensor, "out r"], A: Float[Tensor, "r in"]) -> Svd:
    """`svd` of B A, from r × r matrices: B = Q R, Aᵀ = P S, and B A = Q (R Sᵀ) Pᵀ."""
    (Q, R), (P, S) = torch.linalg.qr(B), torch.linalg.qr(A.T)
    U, values, Vh = svd(R @ S.T)
    return Q @ U, values, Vh @ P.T


def polar(columns: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
    """U Vᵀ of `svd`: the nearest orthonormal columns, if the columns are independent."""
    U, _, Vh = svd(columns)
    return U @ Vh
