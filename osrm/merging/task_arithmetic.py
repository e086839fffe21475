"""Task arithmetic: every task receives the scaled sum of all updates (Ilharco et al., 2023)."""

from collections.abc import Mapping, Sequence

from osrm.merging._updates import Inputs, Lazy, Part


def task_arithmetic(
    updates: Inputs, *, scale: float = 1.0, weights: Sequence[float] | None = None
) -> Mapping[str, Part]:
    """λ Σ_t w_t τ_t (Sec. 2, addition), for all tasks alike.

    Args:
        scale: λ; 1/T is the average, a negative one makes the model forget the tasks.
        weights: w, one a task in their order; 1 by default.
    """
    given = weights or [1.0] * len(updates.tasks)
    return Lazy(updates, lambda name: updates.weighted_sum(name, given, scale))
