"""TSV-M: the tasks' top singular vectors, made orthogonal (Gargiulo et al., 2025)."""

import torch

from osrm.merging._factors import polar, product_svd
from osrm.merging._updates import Inputs, Parts
from osrm.task_vectors import Lazy, LoraPair


def tsv(updates: Inputs, *, scale: float = 1.0) -> Parts:
    """λ U⊥ Σ V⊥ᵀ, for all tasks alike.

    U⊥ and V⊥ are nearest to the tasks' singular vectors. At most ⌊min(out, in) / T⌋ singular
    triples of each of the T updates count (Alg. 1). The authors' code keeps directions that are
    rounding, so it gives something else for updates of low rank (docs/merge.md).
    """

    def merged(name: str) -> LoraPair:
        factors = updates.factors(name)
        B, A = factors[0]
        room = max(1, min(len(B), A.shape[1]) // len(factors))
        Us, values, Vhs = zip(*(product_svd(B, A) for B, A in factors))
        U = polar(torch.cat([U[:, :room] for U in Us], 1))
        V = polar(torch.cat([Vh[:room].T for Vh in Vhs], 1))
        scaled = U * torch.cat([sigma[:room] for sigma in values])
        return LoraPair(V.T.to(updates.dtype), scaled.to(updates.dtype), scale)

    return Lazy(updates, merged)
