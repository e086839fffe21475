"""Iso-CTS: Iso-C, with room for directions of the tasks' own (Marczak et al., 2025)."""

import torch

from osrm.merging._factors import CUT, polar, product_svd
from osrm.merging._updates import Inputs, Parts
from osrm.task_vectors import Lazy, LoraPair


def iso_cts(updates: Inputs, *, common: float = 0.8, scale: float = 1.0) -> Parts:
    """λ σ̄ U⊥ V⊥ᵀ, for all tasks alike (Alg. 2).

    Of the k directions of Σ_t τ_t the strongest stay, a share of `common`. The others give way to
    as many of the tasks: the strongest of τ_t - U Uᵀ τ_t, with the common U. U⊥ and V⊥ are nearest
    to all k of them, σ̄ is the mean of their singular values. The authors' iso-merging counts
    min(out, in) directions instead of k (docs/merge.md).
    """

    def merged(name: str) -> LoraPair:
        factors = updates.factors(name)
        B, A = zip(*factors)
        U, values, Vh = product_svd(torch.cat(B, 1), torch.cat(A))
        k, tasks = len(values), len(factors)
        own = min(round((k - int(common * k)) / tasks), k // tasks)
        stay = k - own * tasks
        lefts, strengths, rights = [U[:, :stay]], [values[:stay]], [Vh[:stay]]
        for B_t, A_t in factors:
            largest = product_svd(B_t, A_t)[1][:1]
            U_t, values_t, Vh_t = product_svd(B_t - U[:, :stay] @ (U[:, :stay].T @ B_t), A_t)
            # Of a task inside the common directions only rounding is left.
            there = values_t[:own] > CUT * largest
            lefts.append(U_t[:, :own][:, there])
            strengths.append(values_t[:own][there])
            rights.append(Vh_t[:own][there])
        P, Q = polar(torch.cat(lefts, 1)), polar(torch.cat(rights).T)
        strength = torch.cat(strengths).mean() if k else 0.0
        return LoraPair(Q.T.to(updates.dtype), (strength * P).to(updates.dtype), scale)

    return Lazy(updates, merged)
