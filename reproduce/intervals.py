"""Differences of two starts: Student's interval over the seeds, and Holm's correction.

Each seed draws its own examples, so the spread over the seeds holds the noise of the examples and
that of the training. simulation.py shows what the intervals cover.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from scipy.stats import t

ALPHA = 0.05


@dataclass(frozen=True)
class Difference:
    """The mean of one difference per seed, × 100, with its interval."""

    mean: float
    low: float
    high: float
    p: float
    """Of the mean being `bound`, two-sided; 1 with one seed."""
    seeds: tuple[int, ...]
    bound: float = 0.0

    def __str__(self) -> str:
        if len(self.seeds) == 1:
            return f"{self.mean:+.1f}, one seed"
        star = "" if self.verdict == "undecided here" else " *"
        return f"{self.mean:+.1f} [{self.low:+.1f}, {self.high:+.1f}]{star}"

    @property
    def verdict(self) -> str:
        """Whether the mean is above the bound, as far as p tells."""
        if self.p >= ALPHA:
            return "undecided here"
        return "shows here" if self.mean > self.bound else "does not show here"


def student(values: Mapping[int, float], bound: float = 0.0) -> Difference | None:
    """The mean of {seed: value}, × 100, with Student's interval; None without a value.

    Args:
        bound: what the mean is compared with, × 100.
    """
    if not values:
        return None
    sample = 100 * np.array([*values.values()])
    middle, p, half = float(sample.mean()), 1.0, np.inf
    if len(sample) > 1:
        error, freedom = sample.std(ddof=1) / len(sample) ** 0.5, len(sample) - 1
        half = error * t.ppf(1 - ALPHA / 2, freedom)
        p = 2 * t.sf(abs(middle - bound) / error, freedom) if error else float(middle == bound)
    return Difference(middle, middle - half, middle + half, p, tuple(values), bound)


def holm(family: Mapping[str, Difference]) -> dict[str, Difference]:
    """The same differences, their p corrected for their number (Holm, 1979)."""
    corrected, largest = {}, 0.0
    for before, name in enumerate(sorted(family, key=lambda name: family[name].p)):
        largest = max(largest, min(1.0, (len(family) - before) * family[name].p))
        corrected[name] = replace(family[name], p=largest)
    return corrected
