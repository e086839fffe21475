"""RegMean: the update whose outputs are nearest to every task's own (Jin et al., 2023)."""

import math
from collections.abc import Mapping, Sequence
from functools import reduce

import torch
from jaxtyping import Float
from torch import Tensor

from osrm.errors import UserError
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
        ridge: δ_t in units of the mean eigenvalue of G_t (of 1 where nothing ever enters).
        off_diagonal: what G's entries off the diagonal are multiplied by (paper, Sec. 3.2).

    Raises:
        UserError: at a look-up, where the equations are singular, as few features without a ridge
            make them.
    """

    def merged(name: str) -> LoraPair:
        B, A = zip(*updates.factors(name), strict=True)
        weighted, total = [], torch.zeros(())
        for right, moment in zip(A, statistics[name], strict=True):
            G = gram(moment, ridge, off_diagonal)
            weighted.append(right @ G)
            total = total + G
        factor, singular = torch.linalg.cholesky_ex(total)
        if singular:
            raise UserError(f"regmean: the equations of {name} are singular; take a larger ridge")
        solved = torch.cholesky_solve(torch.cat(weighted).T, factor)
        left = torch.cat(B, 1).to(updates.dtype)
        return LoraPair(solved.T.to(updates.dtype), left, 1.0)

    return Lazy(updates, merged)


def gram(moment: Moment, ridge: float, off_diagonal: float) -> Float[Tensor, "d d"]:
    """G + δ I in float64, its other entries shrunk."""
    G = moment.gram / max(moment.count, 1)
    diagonal = G.diagonal() + ridge * (float(G.diagonal().mean()) or 1.0)
    G = off_diagonal * G
    G.diagonal().copy_(diagonal)
    return G


def condition(
    moments: Sequence[Moment], *, ridge: float = RIDGE, off_diagonal: float = 1.0
) -> float:
    """Largest over smallest eigenvalue of the equations that `regmean` solves for one module."""
    total = reduce(torch.add, (gram(moment, ridge, off_diagonal) for moment in moments))
    values = torch.linalg.eigvalsh(total)
    return float(values[-1] / values[0]) if values[0] > 0 else math.inf
