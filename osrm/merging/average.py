"""Average: every task receives the mean update, the "uniform soup" (Wortsman et al., 2022)."""

from osrm.errors import UserError
from osrm.merging._updates import Inputs, Parts, Weighted, Weights
from osrm.merging.task_arithmetic import task_arithmetic


def average(updates: Inputs, *, weights: Weights = None) -> Parts:
    """Σ_t w_t τ_t / Σ_t w_t; w is equal by default."""
    weights = weights or [1.0] * len(updates.tasks)
    total = sum(weights)
    if abs(total) <= 1e-9 * sum(map(abs, weights)):
        raise UserError("weights: they sum to 0, so there is no mean; change one")
    return task_arithmetic(Weighted(updates, [weight / total for weight in weights]))
