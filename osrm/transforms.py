"""Moving a trained update away from the other tasks, by closed forms of the tasks' statistics.

`LoraPair.project` is the paper's (Sec. 5.4): an A that avoids the others, and the B nearest to the
update. `nullify` is ours: the adapter keeps its rank and its B, and only its A is filtered.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from osrm.moments import Moment
from osrm.task_vectors import LoraPair, Update, dense


def nullify(
    A: Float[Tensor, "rank d"], own: Moment, others: Moment, kappa: float, epsilon: float
) -> Float[Tensor, "rank d"]:
    """A' whose answers stay on own features and vanish on the others', in least squares.

    A' = A (S_own + δ I) (S_own + κ S_others + δ I)⁻¹, δ = ε · tr(S_own)/d, minimises

        E_own ‖B (A' - A) h‖² + κ E_others ‖B A' h‖² + δ ‖B (A' - A)‖²

    for every B alike. So at δ → 0 no other filter of A, such as taking the others' dominant
    directions out, leaves as little energy of the others at as small a change of the own outputs;
    δ keeps A as it was where hardly any feature was seen. With κ = 0 nothing changes; with
    κ → ∞ the update is zero wherever the others have energy. Filtered with Σ_t S_t instead of
    S_own + κ S_others, the tasks' updates add up to the RegMean merge (Jin et al., 2023).
    """
    S_own, S_others = (each.gram / max(each.count, 1) for each in (own, others))
    # Never less than the rounding of the eigenvalues, or there is no factorisation.
    largest = float((S_own + kappa * S_others).diagonal().sum())
    rounding = len(S_own) * torch.finfo(torch.float64).eps * largest
    S_own.diagonal().add_(max(epsilon * own.mean_energy, rounding) or 1.0)
    factor = torch.linalg.cholesky(S_own + kappa * S_others)
    return torch.cholesky_solve(S_own @ A.double().T, factor).T.float()


def factorised(update: Update, rank: int, scaling: float) -> LoraPair:
    """The update as factors: a pair stays as it is, a dense one gets its nearest of that rank.

    Nearest in the Frobenius norm (Eckart and Young), with orthonormal rows of A.
    """
    if isinstance(update, LoraPair):
        return update
    U, S, Vt = torch.linalg.svd(dense(update), full_matrices=False)
    return LoraPair(Vt[:rank], U[:, :rank] * S[:rank] / scaling, scaling)


def uniform(pair: LoraPair, rank: int, scaling: float) -> LoraPair:
    """The same update with that rank, padded with zeros, and that scaling."""
    lacking = rank - len(pair.A)
    A = torch.nn.functional.pad(pair.A.float(), (0, 0, 0, lacking))
    B = torch.nn.functional.pad(pair.B.float(), (0, lacking))
    return LoraPair(A, B * (pair.scaling / scaling), scaling)
