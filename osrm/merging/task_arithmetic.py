"""Task arithmetic: every task receives the scaled sum of all updates (Ilharco et al., 2023)."""

from jaxtyping import Float
from torch import Tensor

from osrm.merging._updates import LazyUpdates, Updates


def task_arithmetic(updates: Updates, *, scale: float = 1.0) -> Updates:
    """λ Σ_t τ_t (Sec. 2, addition), for all tasks alike (a view with stride 0 along the tasks).

    Args:
        updates: the stack τ of every module.
        scale: λ; 1/T is the average, a negative one makes the model forget the tasks.
    """

    def merged(name: str) -> Float[Tensor, "task out in"]:
        deltas = updates[name]
        return (scale * deltas.sum(0)).expand_as(deltas)

    return LazyUpdates(updates, merged)
