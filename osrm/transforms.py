"""Closed forms that move a trained update away from the other tasks, from the tasks' statistics.

`LoraPair.project` is the paper's (Sec. 5.4): an A that avoids the others, and the B nearest to the
update. `nullify` is ours: it changes A alone, and the adapter keeps its rank and its B.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from osrm.moments import Moment
from osrm.task_vectors import LoraPair, Update, dense


def nullify(
    A: Float[Tensor, "rank d"], own: Moment, others: Moment, *, kappa: float, epsilon: float
) -> Float[Tensor, "rank d"]:
    """A' that keeps A h on own features h and makes it zero on the others', in least squares.

    A' = A (S_own + δ I) (S_own + κ S_others + δ I)⁻¹, δ = ε · tr(S_own)/d, minimises

        E_own ‖B (A' - A) h‖² + κ E_others ‖B A' h‖² + δ ‖B (A' - A)‖²

    for every B. So with δ → 0 no other filter of A, such as the removal of the others' dominant
    directions, has less energy of the others at the same change of the own outputs. δ keeps A
    in directions without features. κ = 0 changes nothing; κ → ∞ makes the update zero wherever
    the others have energy. With Σ_t S_t in place of S_own + κ S_others, the tasks' updates add
    up to the RegMean merge (Jin et al., 2023).
    """
    S_own, S_others = (moment.gram / max(moment.count, 1) for moment in (own, others))
    # At least the rounding of the eigenvalues, or Cholesky fails.
    largest = float((S_own + kappa * S_others).diagonal().sum())
    rounding = len(S_own) * torch.finfo(torch.float64).eps * largest
    S_own.diagonal().add_(max(epsilon * own.mean_energy, rounding) or 1.0)
    factor = torch.linalg.cholesky(S_own + kappa * S_others)
    return torch.cholesky_solve(S_own @ A.double().T, factor).T.float()


def factorised(update: Update, rank: int, scaling: float) -> LoraPair:
    """A pair as it is; of a dense update the nearest pair (Eckart and Young), A orthonormal."""
    if isinstance(update, LoraPair):
        return update
    U, S, Vt = torch.linalg.svd(dense(update), full_matrices=False)
    return LoraPair(Vt[:rank], U[:, :rank] * S[:rank] / scaling, scaling)


def uniform(pair: LoraPair, rank: int, scaling: float) -> LoraPair:
    """The same update with that scaling and that rank, padded with zeros."""
    missing = rank - len(pair.A)
    A = pad(pair.A.float(), (0, 0, 0, missing))
    B = pad(pair.B.float(), (0, missing))
    return LoraPair(A, B * (pair.scaling / scaling), scaling)
