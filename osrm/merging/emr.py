"""EMR: elect one unified update, mask and rescale it for each task (Huang et al., 2024)."""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from osrm.merging._updates import Inputs, Lazy, Masked, Part, pack


def emr(updates: Inputs) -> Mapping[str, Part]:
    """Task t receives rescaler_t · mask_t · unified: tasks share one update, but not one sign.

    Up to its rescaler, task t thus receives the largest entry among the tasks that agree with the
    elected sign, and zero where t itself does not agree. The updates are read once before the
    first look-up.
    """
    rescaler = rescalers(updates).to(updates.dtype)

    def merged(name: str) -> Masked:
        unified, masks = [], []
        for _, deltas in updates.blocks(name):
            one, agrees = elect(deltas)
            unified.append(one)
            masks.append(agrees)
        return Masked(torch.cat(unified), pack(torch.cat(masks, 1)), rescaler)

    return Lazy(updates, merged)


def elect(
    deltas: Float[Tensor, "task out in"],
) -> tuple[Float[Tensor, "out in"], Bool[Tensor, "task out in"]]:
    """unified = γ · max |τ| over the agreeing tasks, and mask_t = τ_t γ > 0.

    γ is +1 where the tasks' mean is positive, else -1 (summed in float64: see TIES).
    """
    positive = deltas.sum(0, dtype=torch.float64) > 0
    sign = positive.to(deltas.dtype) * 2 - 1
    agreeing = (deltas * sign).clamp_(min=0)
    return sign * agreeing.amax(0), agreeing > 0


def rescalers(updates: Inputs) -> Float64[Tensor, "task"]:
    """Σ_modules mean|τ_t| / Σ_modules mean|mask_t · unified|: modules of any size count alike.

    So the authors' code; their paper divides the sums over all entries instead. For a task that
    agrees nowhere, such as one without an update, the quotient by zero is taken to be zero.
    """
    own = unified = torch.zeros(len(updates.tasks), dtype=torch.float64)
    for name in updates:
        entries = 0
        sums = torch.zeros(2, len(updates.tasks), dtype=torch.float64)
        for _, deltas in updates.blocks(name):
            one, agrees = elect(deltas)
            entries += one.numel()
            sums[0] += deltas.abs().sum((1, 2), dtype=torch.float64)
            sums[1] += (agrees * one.abs()).sum((1, 2), dtype=torch.float64)
        own, unified = own + sums[0] / entries, unified + sums[1] / entries
    return torch.where(unified > 0, own / unified, 0.0)
