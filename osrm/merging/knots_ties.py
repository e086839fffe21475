"""KnOTS-TIES: TIES in the basis that the updates' outputs share (Stoica et al., 2025)."""

from collections.abc import Mapping
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from osrm.merging._factors import svd
from osrm.merging._updates import Inputs, Lazy, Part, row
from osrm.merging.ties import ties
from osrm.task_vectors import LoraPair


def knots_ties(
    updates: Inputs, *, density: float = 1.0, scale: float = 1.0, trim: str = "global"
) -> Mapping[str, Part]:
    """U TIES(Σ V_1ᵀ, ..., Σ V_Tᵀ) with [τ_1 ... τ_T] = U Σ [V_1ᵀ ... V_Tᵀ], for all tasks alike.

    TIES runs as by itself, on coordinates instead of entries. The authors trim nothing with
    language models, hence the density.
    """

    def basis(name: str) -> Float[Tensor, "out k"]:
        factors = updates.factors(name)
        # [τ_1 ... τ_T] = Q [R_1 S_1ᵀ P_1ᵀ ...] with orthonormal P_t, which leave U as it is.
        Q, R = torch.linalg.qr(torch.cat([B for B, _ in factors], 1))
        parts = R.split([A.shape[0] for _, A in factors], 1)
        triangles = [torch.linalg.qr(A.T)[1].T for _, A in factors]
        small = torch.cat([r @ s for r, s in zip(parts, triangles, strict=True)], 1)
        return Q @ svd(small)[0]

    def coordinates(name: str) -> Float[Tensor, "task k in"]:
        U = bases(name)
        return torch.stack([(U.T @ B) @ A for B, A in updates.factors(name)])

    bases = cache(basis)
    merged = ties(updates.like(coordinates), density=density, trim=trim)

    def lifted(name: str) -> LoraPair:
        return LoraPair(row(merged[name], 0), bases(name).to(updates.dtype), scale)

    return Lazy(updates, lifted)
