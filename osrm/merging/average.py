"""Average: every task receives the mean update, the "uniform soup" (Wortsman et al., 2022)."""

from collections.abc import Mapping, Sequence

from osrm.errors import UserError
from osrm.merging._updates import Inputs, Lazy, Part


def average(updates: Inputs, *, weights: Sequence[float] | None = None) -> Mapping[str, Part]:
    """Σ_t w_t τ_t / Σ_t w_t, for all tasks alike.

    Args:
        weights: w, one a task in their order; equal by default.
    """
    given = weights or [1.0] * len(updates.tasks)
    if abs(sum(given)) <= 1e-9 * sum(map(abs, given)):
        raise UserError("weights: they sum to 0, so there is no mean; change one")
    shares = [weight / sum(given) for weight in given]
    return Lazy(updates, lambda name: updates.weighted_sum(name, shares))
