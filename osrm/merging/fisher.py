"""Fisher merging: a mean with the Fisher information as weights (Matena and Raffel, 2022)."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from osrm.merging._updates import Inputs, Parts, Weights
from osrm.task_vectors import Lazy

FLOOR = 1e-6
"""Added to the Fisher information, so that entries without any get the plain mean."""


def fisher(
    updates: Inputs,
    statistics: Mapping[str, Float[Tensor, "task out in"]],
    *,
    scale: float = 1.0,
    weights: Weights = None,
) -> Parts:
    """λ Σ_t w_t c_t F_t τ_t / Σ_t w_t c_t F_t entry by entry, for all tasks alike.

    F_t is the diagonal of the task's Fisher information, given in `statistics`. As in MergeLM,
    c_t = 1 / (‖F_t‖ + 10⁻⁶), so that tasks with larger gradients do not count more.
    """
    squares = [statistics[name].square().sum((1, 2), dtype=torch.float64) for name in updates]
    norms = (torch.stack(squares).sum(0).sqrt() + FLOOR).to(updates.dtype)
    given = weights or [1.0] * len(updates.tasks)
    norms /= torch.tensor(given, dtype=updates.dtype, device=updates.device)

    def merged(name: str) -> Float[Tensor, "out in"]:
        shares = (statistics[name].to(updates.dtype) + FLOOR) / norms[:, None, None]
        shares = shares / shares.sum(0)
        blocks = updates.blocks(name)
        return scale * torch.cat([(shares[:, rows] * block).sum(0) for rows, block in blocks])

    return Lazy(updates, merged)
