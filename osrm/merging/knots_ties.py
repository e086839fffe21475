"""KnOTS-TIES: TIES in the basis that the updates' outputs share (Stoica et al., 2025)."""

from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from osrm.merging._factors import svd
from osrm.merging._updates import Inputs, Parts
from osrm.merging.ties import ties
from osrm.task_vectors import Lazy, LoraPair


def knots_ties(
    updates: Inputs, *, density: float = 1.0, scale: float = 1.0, trim: str = "global"
) -> Parts:
    """U TIES(Σ V_1ᵀ, ..., Σ V_Tᵀ), for all tasks alike.

    U Σ [V_1ᵀ ... V_Tᵀ] is the SVD of [τ_1 ... τ_T]. By default no coordinate is trimmed, as in the
    authors' experiments with language models.
    """

    @cache
    def basis(name: str) -> Float[Tensor, "out k"]:
        B, A = zip(*updates.factors(name))
        # [τ_1 ... τ_T] = Q [R_1 S_1ᵀ P_1ᵀ ...], and the orthonormal P_t do not change U.
        Q, R = torch.linalg.qr(torch.cat(B, 1))
        parts = zip(R.split([len(a) for a in A], 1), A)
        return Q @ svd(torch.cat([r @ torch.linalg.qr(a.T)[1].T for r, a in parts], 1))[0]

    def coordinates(name: str) -> Float[Tensor, "task k in"]:
        return torch.stack([(basis(name).T @ B) @ A for B, A in updates.factors(name)])

    merged = ties(updates.like(coordinates), density=density, trim=trim)
    return Lazy(updates, lambda name: LoraPair(merged[name], basis(name).to(updates.dtype), scale))
