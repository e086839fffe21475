"""Iso-C: the sum of the updates with all its directions equally strong (Marczak et al., 2025)."""

import torch

from osrm.merging._factors import product_svd
from osrm.merging._updates import Inputs, Parts
from osrm.task_vectors import Lazy, LoraPair


def iso_c(updates: Inputs, *, scale: float = 1.0) -> Parts:
    """λ σ̄ U Vᵀ of the SVD U Σ Vᵀ of Σ_t τ_t, for all tasks alike.

    σ̄ is the mean over the k directions that the sum has. The authors' iso-merging divides by
    min(out, in) instead, so its λ is another unless the sum has full rank, as in the paper.
    """

    def merged(name: str) -> LoraPair:
        B, A = zip(*updates.factors(name))
        U, values, Vh = product_svd(torch.cat(B, 1), torch.cat(A))
        strength = values.mean() if len(values) else 0.0
        return LoraPair(Vh.to(updates.dtype), (strength * U).to(updates.dtype), scale)

    return Lazy(updates, merged)
