"""Fisher merging: the mean weighted by how much each entry matters (Matena and Raffel, 2022)."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from osrm.merging._updates import Inputs, Lazy, Part

FLOOR = 1e-6
"""Added to each Fisher information, so that entries that matter to nobody get the mean."""


def fisher(
    updates: Inputs, statistics: Mapping[str, Float[Tensor, "task out in"]]
) -> Mapping[str, Part]:
    """Σ_t c_t F_t τ_t / Σ_t c_t F_t entry by entry, for all tasks alike.

    c_t = 1 / (‖F_t‖ + 10⁻⁶) lets tasks count alike however large their gradients are, as in
    MergeLM. The weights' mean would be W0 plus this, since the coefficients sum to one.

    Args:
        statistics: F of every module, the diagonal of each task's Fisher information.
    """
    squares = [statistics[name].square().sum((1, 2), dtype=torch.float64) for name in updates]
    norms = (torch.stack(squares).sum(0).sqrt() + FLOOR).to(updates.dtype)

    def merged(name: str) -> Float[Tensor, "out in"]:
        shares = (statistics[name].to(updates.dtype) + FLOOR) / norms[:, None, None]
        shares = shares / shares.sum(0)
        return torch.cat([(shares[:, rows] * block).sum(0) for rows, block in updates.blocks(name)])

    return Lazy(updates, merged)
