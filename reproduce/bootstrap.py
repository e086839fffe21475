"""Paired differences of two starts: bootstrap intervals over seeds and examples.

Both levels are resampled (Davison and Hinkley, 1997, Sec. 3.8): the seeds, and within each seed
the examples of each task. Both starts get the same examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from scipy.stats import sem, t

from osrm import metrics
from osrm.glue import TASKS

RESAMPLES = 2000
Array = np.ndarray


def score(task: str, predicted: Array, true: Array) -> Array:
    """The task's score (...) of predictions and labels (..., examples)."""
    return metrics.scores(TASKS[task].metrics, predicted, true)[TASKS[task].score]


def example_resamples(
    predictions: pd.DataFrame, rows: Sequence[str], resamples: int = RESAMPLES
) -> dict[str, Array]:
    """{row: average score of the tasks (resamples,)} on resampled examples of each task.

    Runs with the same tasks and numbers of examples draw the same examples.

    Args:
        predictions: a run's predictions.parquet.
    """
    totals = dict.fromkeys(rows, np.zeros(resamples))
    reported = predictions[predictions.split == ""]
    parts = dict([*reported.groupby("task")])
    for number, task in enumerate(TASKS):
        if task not in parts:
            continue
        part = parts[task]
        drawn = np.random.default_rng(number).integers(0, len(part), (resamples, len(part)))
        true = part.label.to_numpy(float)[drawn]
        for row in rows:
            scores = score(task, part[row].to_numpy(float)[drawn], true)
            totals[row] = totals[row] + scores / len(parts)
    return totals


def interval(differences: Mapping[int, Array], level: float = 0.95) -> tuple[float, float]:
    """The percentile interval of the mean difference.

    Args:
        differences: {seed: one start's `example_resamples` minus another's}.
    """
    table = np.stack([*differences.values()])
    seeds, resamples = table.shape
    rng = np.random.default_rng(0)
    chosen = (
        rng.integers(0, seeds, (resamples, seeds)),
        rng.integers(0, resamples, (resamples, seeds)),
    )
    low, high = np.quantile(table[chosen].mean(1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def seed_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Student's interval of the mean of one value per seed, for two or more seeds.

    A percentile bootstrap of three seeds cannot go beyond the least and the largest value. Without
    any effect it would exclude 0 in a quarter of all studies.
    """
    half = t.ppf((1 + level) / 2, len(values) - 1) * sem(values)
    return float(np.mean(values) - half), float(np.mean(values) + half)
