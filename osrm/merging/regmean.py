"""RegMean: the update whose outputs are nearest to every task's own (Jin et al., 2023)."""

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from osrm.errors import UserError
from osrm.merging._updates import Inputs, Parts, Weights
from osrm.moments import Moment
from osrm.task_vectors import Lazy, LoraPair

RIDGE = 1e-3


def regmean(
    updates: Inputs,
    statistics: Mapping[str, Sequence[Moment]],
    *,
    ridge: float = RIDGE,
    off_diagonal: float = 1.0,
    scale: float = 1.0,
    weights: Weights = None,
) -> Parts:
    """λ argmin Σ_t E‖(ΔW - ΔW_t) h_t‖² = λ (Σ_t ΔW_t G_t) (Σ_t G_t)⁻¹, G_t = E[h hᵀ] of task t.

    `statistics` has the moments of every module's inputs in each task's own model. `off_diagonal`
    scales the entries of G_t off the diagonal (paper, Sec. 3.2). `ridge` is δ_t in units of the
    mean eigenvalue of G_t, or of 1 if this is 0. It adds δ_t I to G_t, so that directions in which
    no task has features get the mean of the updates. `weights` multiply the G_t. A look-up refuses
    singular equations.
    """
    given = weights or [1.0] * len(updates.tasks)

    def merged(name: str) -> LoraPair:
        B, A = zip(*updates.factors(name))
        weighted, total = [], torch.zeros(())
        for factor, moment, w in zip(A, statistics[name], given, strict=True):
            G = gram(moment, ridge, off_diagonal).mul_(w)
            weighted.append(factor @ G)
            total = total + G
        triangle, failed = torch.linalg.cholesky_ex(total)
        # Of dependent features rounding may leave a tiny pivot, which is no failure.
        rounding = len(total) * torch.finfo(total.dtype).eps * total.diagonal()
        if failed or (triangle.diagonal().square() <= rounding).any():
            raise UserError(f"regmean: the equations of {name} are singular; take a larger ridge")
        solved = torch.cholesky_solve(torch.cat(weighted).T, triangle).T
        return LoraPair(solved.to(updates.dtype), torch.cat(B, 1).to(updates.dtype), scale)

    return Lazy(updates, merged)


def gram(moment: Moment, ridge: float, off_diagonal: float) -> Float[Tensor, "d d"]:
    """G + δ I in float64, with smaller entries off the diagonal."""
    G = moment.gram / max(moment.count, 1)
    diagonal = G.diagonal() + ridge * (float(G.diagonal().mean()) or 1.0)
    G *= off_diagonal
    G.diagonal().copy_(diagonal)
    return G


def condition(
    moments: Sequence[Moment],
    ridge: float = RIDGE,
    off_diagonal: float = 1.0,
    weights: Weights = None,
) -> float:
    """Largest over smallest eigenvalue of the equations that `regmean` solves for one module."""
    pairs = zip(moments, weights or [1.0] * len(moments))
    grams = (gram(moment, ridge, off_diagonal).mul_(w) for moment, w in pairs)
    values = torch.linalg.eigvalsh(sum(grams, torch.zeros(())))
    return float(values[-1] / values[0]) if values[0] > 0 else math.inf
