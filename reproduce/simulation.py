"""What the intervals cover: studies simulated from the predictions of a real one.

A simulated seed takes each task from one of the real seeds, at random, and draws its examples
anew. Tasks are drawn apart because they are trained apart. The mean of all such seeds is known, so
a simulated study has an interval and a truth.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
import pandas as pd
from intervals import ALPHA
from scipy.stats import t
from study import REFERENCES, Array, Study, score

STUDIES, RESAMPLES = 2000, 100
POWER = 0.8


@dataclass(frozen=True)
class Reliability:
    """What Student's intervals of so many seeds hold and find, over all comparisons."""

    coverage: tuple[float, ...]
    """Per comparison: the share of intervals that hold the truth, mean over the methods."""
    false: tuple[float, ...]
    """Per comparison without any effect: how often a method differs after Holm's correction."""
    alone: float
    """The difference × 100 that is found in 80 % of studies, if it is the only one that is asked
    for: median over comparisons and methods."""
    corrected: float
    """The same at Holm's first step, the hardest one."""


def reliability(scores: Sequence[Array], seeds: int) -> Reliability:
    """Simulate studies of so many seeds.

    Args:
        scores: of each comparison, `resampled_differences`.
    """
    rng = np.random.default_rng(0)
    coverage, false, alone, corrected = [], [], [], []
    for each in scores:
        found = simulated(each, seeds, rng)
        methods = found.shape[-1]
        mean, error = found.mean(1), found.std(1, ddof=1) / np.sqrt(seeds)
        half, first = (error * t.ppf(1 - ALPHA / 2 / count, seeds - 1) for count in (1, methods))
        coverage.append((abs(mean) <= half).mean())
        false.append((abs(mean) > first).any(1).mean())
        alone += [*np.quantile(half - mean, POWER, axis=0)]
        corrected += [*np.quantile(first - mean, POWER, axis=0)]
    return Reliability(tuple(coverage), tuple(false), median(alone), median(corrected))


def simulated(differences: Array, seeds: int, rng: np.random.Generator) -> Array:
    """Average differences of simulated seeds, less their true mean (STUDIES, seeds, methods)."""
    real, tasks, _, resamples = differences.shape
    shape = (STUDIES, seeds, tasks)
    chosen, drawn = rng.integers(0, real, shape), rng.integers(0, resamples, shape)
    return differences[chosen, np.arange(tasks), :, drawn].mean(2) - differences.mean((0, 1, 3))


def resampled_differences(
    study: Study, pairs: Iterable[tuple[str, str]], resamples: int = RESAMPLES
) -> list[Array]:
    """Of each pair of runs the differences × 100 (seeds, tasks, methods, resamples)."""
    known: dict[tuple[str, int], Array] = {}
    found = []
    for pair in pairs:
        seeds = study.paired(*pair)
        for key in ((run, seed) for run in pair for seed in seeds):
            if key not in known:
                known[key] = resampled_scores(study.predictions(*key), study.rows, resamples)
        if seeds:
            found.append(np.stack([known[pair[0], seed] - known[pair[1], seed] for seed in seeds]))
    return found


def resampled_scores(predictions: pd.DataFrame, rows: Iterable[str], resamples: int) -> Array:
    """Scores × 100 (tasks, methods, resamples) of a run on resampled examples.

    Runs with the same tasks and numbers of examples draw the same examples.
    """
    methods = [row for row in rows if row in predictions and row not in REFERENCES]
    scores = []
    for number, (task, part) in enumerate(predictions[predictions.split == ""].groupby("task")):
        rng = np.random.default_rng(number)
        drawn = rng.integers(0, len(part), (resamples, len(part)))
        true = part.label.to_numpy(float)[drawn]
        scores.append([score(task, part[row].to_numpy(float)[drawn], true) for row in methods])
    return 100 * np.array(scores)
