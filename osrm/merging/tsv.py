"""TSV-M: the tasks' top singular vectors, made orthogonal (Gargiulo et al., 2025)."""

from collections.abc import Mapping

import torch

from osrm.merging._factors import polar, product_svd
from osrm.merging._updates import Inputs, Lazy, Part
from osrm.task_vectors import LoraPair


def tsv(updates: Inputs, *, scale: float = 1.0) -> Mapping[str, Part]:
    """λ U⊥ Σ V⊥ᵀ, for all tasks alike: U⊥ and V⊥ are nearest to the tasks' singular vectors.

    Of each of the T updates ⌊min(out, in) / T⌋ singular triples count, so that all together are
    no more than there is room for (paper, Alg. 1); a LoRA update seldom has so many.
    """

    def merged(name: str) -> LoraPair:
        room = max(1, min(updates.shape(name)) // len(updates.tasks))
        svds = [product_svd(B, A) for B, A in updates.factors(name)]
        values = torch.cat([each[:room] for _, each, _ in svds])
        U = polar(torch.cat([each[:, :room] for each, _, _ in svds], 1))
        V = polar(torch.cat([each[:room].T for _, _, each in svds], 1))
        return LoraPair(V.T.to(updates.dtype), (U * values).to(updates.dtype), scale)

    return Lazy(updates, merged)
