"""Task arithmetic: every task receives the scaled sum of all updates (Ilharco et al., 2023)."""

from osrm.merging._updates import Inputs, Parts
from osrm.task_vectors import Lazy


def task_arithmetic(updates: Inputs, *, scale: float = 1.0) -> Parts:
    """λ Σ_t τ_t (Sec. 2, addition). A negative λ makes the model forget the tasks."""
    return Lazy(updates, lambda name: updates.sum(name, scale))
