"""EMR: elect one unified update, mask and rescale it for each task (Huang et al., 2024)."""

from functools import reduce

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from osrm.merging._updates import LazyUpdates, Updates


def emr(updates: Updates) -> Updates:
    """Task t receives rescaler_t · mask_t · unified: tasks share one update, but not one sign.

    Up to its rescaler, task t thus receives the largest entry among the tasks that agree with the
    elected sign, and zero where t itself does not agree.

    Args:
        updates: the stack τ of every module. It is read once before the first look-up.
    """
    rescaler = rescalers(updates)

    def merged(name: str) -> Float[Tensor, "task out in"]:
        deltas = updates[name]
        return (rescaler[:, None, None] * mask_unified(deltas)).to(deltas.dtype)

    return LazyUpdates(updates, merged)


def elect_sign(deltas: Float[Tensor, "task out in"]) -> Float[Tensor, "out in"]:
    """γ: +1 where the tasks' mean is positive, else -1 (summed in float64: see TIES)."""
    positive = deltas.sum(0, dtype=torch.float64) > 0
    return positive.to(deltas.dtype) * 2 - 1


def mask_unified(deltas: Float[Tensor, "task out in"]) -> Float[Tensor, "task out in"]:
    """mask_t · unified, with unified = γ · max |τ| over the agreeing tasks, mask_t = τ_t γ > 0."""
    sign = elect_sign(deltas)
    agreeing = (deltas * sign).clamp(min=0)
    unified = sign * agreeing.amax(0)
    return torch.where(agreeing > 0, unified, 0.0)


def rescalers(updates: Updates) -> Float64[Tensor, "task"]:
    """Σ_modules mean|τ_t| / Σ_modules mean|mask_t · unified|: modules of any size count alike.

    So the authors' code; their paper divides the sums over all entries instead. For a task that
    agrees nowhere, such as one without an update, the quotient by zero is taken to be zero.
    """
    own, unified = reduce(torch.add, (magnitudes(updates[name]) for name in updates))
    return torch.where(unified > 0, own / unified, 0.0)


def magnitudes(deltas: Float[Tensor, "task out in"]) -> Float64[Tensor, "2 task"]:
    """One module's mean|τ_t| and mean|mask_t · unified|."""
    return torch.stack(
        [each.abs().mean((1, 2), dtype=torch.float64) for each in (deltas, mask_unified(deltas))]
    )
