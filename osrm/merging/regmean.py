"""RegMean: the update whose outputs are nearest to every task's own (Jin et al., 2023)."""

from collections.abc import Mapping, Sequence
from functools import reduce

import torch
from jaxtyping import Float
from torch import Tensor

from osrm.merging._updates import Inputs, Lazy, Part
from osrm.moments import Moment
from osrm.task_vectors import LoraPair

RIDGE = 1e-3


def regmean(
    updates: Inputs,
    statistics: Mapping[str, Sequence[Moment]],
    *,
    ridge: float = RIDGE,
    off_diagonal: float = 1.0,
) -> Mapping[str, Part]:
    """argmin Σ_t E‖(ΔW - ΔW_t) h_t‖² = (Σ_t ΔW_t G_t) (Σ_t G_t)⁻¹, with G_t = E[h hᵀ] of task t.

    The ridge makes G_t + δ_t I of each G_t, so that what no task has features for gets the mean
    of the updates: adapters that share A or features leave the plain equations nearly singular.
    Equal updates merge to themselves.

    Args:
        statistics: the moments of every module's inputs in the tasks' own models, in their order.
        ridge: δ_t in units of the mean eigenvalue of G_t.
        off_diagonal: what G's entries off the diagonal are multiplied by (paper, Sec. 3.2).
    """

    def merged(name: str) -> LoraPair:
        B, A = zip(*updates.factors(name), strict=True)
        weighted, total = [], torch.zeros(())
        for factor, moment in zip(A, statistics[name], strict=True):
            G = gram(moment, ridge, off_diagonal)
            weighted.append(factor @ G)
            total = total + G
        solved = torch.cholesky_solve(torch.cat(weighted).T, torch.linalg.cholesky(total))
        left = torch.cat(B, 1).to(updates.dtype)
        return LoraPair(solved.T.to(updates.dtype), left, 1.0)

    return Lazy(updates, merged)


def gram(moment: Moment, ridge: float, off_diagonal: float) -> Float[Tensor, "d d"]:
    """G + δ I in float64, its other entries shrunk."""
    G = moment.gram / moment.count
    diagonal = G.diagonal() + ridge * G.diagonal().mean()
    G = off_diagonal * G
    G.diagonal().copy_(diagonal)
    return G


def condition(
    moments: Sequence[Moment], *, ridge: float = RIDGE, off_diagonal: float = 1.0
) -> float:
    """Largest over smallest eigenvalue of the equations that `regmean` solves for one module."""
    total = reduce(torch.add, (gram(moment, ridge, off_diagonal) for moment in moments))
    values = torch.linalg.eigvalsh(total)
    return float(values[-1] / values[0])
