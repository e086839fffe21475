"""Iso-C: the sum of the updates with all its directions equally strong (Marczak et al., 2025)."""

from collections.abc import Mapping

import torch

from osrm.merging._factors import product_svd
from osrm.merging._updates import Inputs, Lazy, Part
from osrm.task_vectors import LoraPair


def iso_c(updates: Inputs, *, scale: float = 1.0) -> Mapping[str, Part]:
    """λ σ̄ U Vᵀ of the SVD U Σ Vᵀ of Σ_t τ_t, for all tasks alike; σ̄ is the mean of Σ.

    The mean is over the directions that the sum has. The paper's updates have full rank; those of
    LoRA have not, and their null directions have no singular vectors of their own to make strong.
    """

    def merged(name: str) -> LoraPair:
        B, A = zip(*updates.factors(name), strict=True)
        U, values, Vh = product_svd(torch.cat(B, 1), torch.cat(A))
        strength = values.mean() if len(values) else 0.0
        return LoraPair(Vh.to(updates.dtype), (strength * U).to(updates.dtype), scale)

    return Lazy(updates, merged)
