"""Paired differences of two starts: bootstrap intervals over seeds and examples.

Both levels are resampled (Davison and Hinkley, 1997, Sec. 3.8): the seeds, and within each seed
the examples of each task, the same ones for both starts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
from scipy.stats import rankdata, sem, t

from osrm.glue import TASKS

RESAMPLES = 2000
Array = np.ndarray
"""Of a metric's arguments: predictions and labels (resamples, examples); it gives (resamples,)."""


def accuracy(predicted: Array, true: Array) -> Array:
    """Share of equal ones."""
    return (predicted == true).mean(1)


def f1(predicted: Array, true: Array) -> Array:
    """F1 of label 1; 0 where neither prediction nor truth has one."""
    positives = (predicted == 1).sum(1) + (true == 1).sum(1)
    hits = ((predicted == 1) & (true == 1)).sum(1)
    return np.divide(2 * hits, positives, out=np.zeros(len(hits)), where=positives > 0)


def pearson(predicted: Array, true: Array) -> Array:
    """Correlation; 0 where one side is constant. Of two classes it is Matthews'."""
    x, y = (each - each.mean(1, keepdims=True) for each in (predicted, true))
    norm = np.sqrt((x * x).sum(1) * (y * y).sum(1))
    flat = (np.ptp(predicted, 1) == 0) | (np.ptp(true, 1) == 0)
    return np.divide((x * y).sum(1), norm, out=np.zeros(len(x)), where=~flat)


def spearman(predicted: Array, true: Array) -> Array:
    """Correlation of the ranks, ties at their mean."""
    return pearson(rankdata(predicted, axis=1), rankdata(true, axis=1))


METRICS: dict[str, Callable[[Array, Array], Array]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews_correlation": pearson,
    "pearson": pearson,
    "spearmanr": spearman,
}


def score(task: str, predicted: Array, true: Array) -> Array:
    """The task's score in every resample (resamples,): the mean of its metrics."""
    return np.mean([METRICS[name](predicted, true) for name in TASKS[task].metrics], axis=0)


def example_resamples(
    predictions: pd.DataFrame, rows: Sequence[str], resamples: int = RESAMPLES
) -> dict[str, Array]:
    """{row: average score of the tasks (resamples,)}, the examples of each task drawn anew.

    Runs with the same tasks and numbers of examples draw the same ones.

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
            found = score(task, part[row].to_numpy(float)[drawn], true)
            totals[row] = totals[row] + found / len(parts)
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
    """Student's interval of the mean of one value a seed, two or more.

    A percentile bootstrap of three seeds would reach from the least to the largest and no further:
    it would exclude 0 in a quarter of all studies without an effect.
    """
    half = t.ppf((1 + level) / 2, len(values) - 1) * sem(values)
    return float(np.mean(values) - half), float(np.mean(values) + half)
