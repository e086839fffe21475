"""Task arithmetic: every task receives the scaled sum of all updates (Ilharco et al., 2023)."""

from osrm.merging._updates import Inputs, Parts, Weights
from osrm.task_vectors import Lazy


def task_arithmetic(updates: Inputs, *, scale: float = 1.0, weights: Weights = None) -> Parts:
    """λ Σ_t w_t τ_t (Sec. 2, addition); w is 1 by default.

    A negative λ makes the model forget the tasks.
    """
    given = weights or [1.0] * len(updates.tasks)
    return Lazy(updates, lambda name: updates.weighted_sum(name, given, scale))
