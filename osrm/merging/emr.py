"""EMR: elect one unified update, mask and rescale it for each task (Huang et al., 2024)."""

import torch
from jaxtyping import Float
from torch import Tensor

from osrm.merging._updates import Inputs, Masked, Parts, elect, pack
from osrm.task_vectors import Lazy


def emr(updates: Inputs, *, scale: float = 1.0) -> Parts:
    """Task t receives λ · rescaler_t · mask_t · unified; all tasks share `unified`.

    rescaler_t = Σ_modules mean|τ_t| / Σ_modules mean|mask_t · unified|, as in the authors' code;
    their paper divides the sums over all entries. A task that agrees nowhere gets zero. The
    updates are read once before the first look-up.
    """
    zero = torch.zeros(2, len(updates.tasks), dtype=torch.float64, device=updates.device)

    def sizes(name: str) -> Float[Tensor, "2 task"]:
        """The means of |τ_t| and of |mask_t · unified| in one module."""
        entries, sums = 0, zero.clone()
        for _, deltas in updates.blocks(name):
            unified, agreeing = unify(deltas)
            size = unified.abs()
            entries += size.numel()
            for i, (delta, mask) in enumerate(zip(deltas.abs_(), agreeing.sign_())):
                sums[0, i] += delta.double().sum()
                sums[1, i] += mask.mul_(size).double().sum()
        return sums / entries

    means = sum(updates.side_by_side(sizes, updates), zero)
    rescaler = torch.where(means[1] > 0, means[0] / means[1], 0.0).to(updates.dtype)

    def merged(name: str) -> Masked:
        parts = (unify(block) for _, block in updates.blocks(name))
        shared, masks = zip(*((unified, pack(agreeing.bool())) for unified, agreeing in parts))
        return Masked(torch.cat(shared), torch.cat(masks, 1), scale * rescaler)

    return Lazy(updates, merged)


def unify(deltas: Tensor) -> tuple[Tensor, Tensor]:
    """unified = γ max|τ| (rows, in) of the agreeing tasks, and max(γ τ_t, 0) (task, rows, in).

    γ is +1 where the tasks' sum is positive, else -1.
    """
    total, agreeing = elect(deltas)
    sign = (total > 0).to(deltas.dtype) * 2 - 1
    return sign * agreeing.amax(0), agreeing
