"""EMR: elect one unified update, mask and rescale it for each task (Huang et al., 2024)."""

import torch
from torch import Tensor

from osrm.merging._updates import Inputs, Masked, Parts, pack
from osrm.task_vectors import Lazy


def emr(updates: Inputs, *, scale: float = 1.0) -> Parts:
    """Task t receives λ · rescaler_t · mask_t · unified; all tasks share `unified`.

    rescaler_t = Σ_modules mean|τ_t| / Σ_modules mean|mask_t · unified|, as in the authors' code;
    their paper divides the sums over all entries. A task that agrees nowhere gets zero. The
    updates are read once before the first look-up.
    """
    means = torch.zeros(2, len(updates.tasks), dtype=torch.float64, device=updates.device)
    for name in updates:
        entries, sums = 0, torch.zeros_like(means)
        for _, deltas in updates.blocks(name):
            unified, mask = elect(deltas)
            entries += unified.numel()
            sums[0] += deltas.abs().sum((1, 2), dtype=torch.float64)
            sums[1] += (mask * unified.abs()).sum((1, 2), dtype=torch.float64)
        means += sums / entries
    rescaler = torch.where(means[1] > 0, means[0] / means[1], 0.0).to(updates.dtype)

    def merged(name: str) -> Masked:
        unified, masks = zip(*(elect(block) for _, block in updates.blocks(name)))
        return Masked(torch.cat(unified), pack(torch.cat(masks, 1)), scale * rescaler)

    return Lazy(updates, merged)


def elect(deltas: Tensor) -> tuple[Tensor, Tensor]:
    """unified = γ max|τ| (rows, in) of the agreeing tasks, and mask_t = τ_t γ > 0 (task, rows, in).

    γ is +1 where the tasks' mean is positive, else -1. The sum is in float64: see `ties`.
    """
    sign = (deltas.sum(0, dtype=torch.float64) > 0).to(deltas.dtype) * 2 - 1
    agreeing = (deltas * sign).clamp_(min=0)
    return sign * agreeing.amax(0), agreeing > 0
