"""Average: every task receives the mean update, the "uniform soup" (Wortsman et al., 2022)."""

from jaxtyping import Float
from torch import Tensor

from osrm.merging._updates import LazyUpdates, Updates


def average(updates: Updates) -> Updates:
    """(1/T) Σ_t τ_t, for all T tasks alike (a view with stride 0 along the tasks)."""

    def merged(name: str) -> Float[Tensor, "task out in"]:
        deltas = updates[name]
        return deltas.mean(0).expand_as(deltas)

    return LazyUpdates(updates, merged)
