"""GLUE's metrics: of predictions and truths (..., n) the scores (...).

A constant prediction or truth has no correlation; it counts as 0.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import numpy as np
from scipy.stats import ConstantInputWarning, pearsonr, rankdata

Array = np.ndarray


def accuracy(predicted: Array, true: Array) -> Array:
    """The share of equal values."""
    return (predicted == true).mean(-1)


def f1(predicted: Array, true: Array) -> Array:
    """F1 of label 1; 0 where neither prediction nor truth has one."""
    positives = (predicted == 1).sum(-1) + (true == 1).sum(-1)
    hits = ((predicted == 1) & (true == 1)).sum(-1)
    return 2 * hits / np.maximum(positives, 1)


def matthews(predicted: Array, true: Array) -> Array:
    """Matthews' correlation of two classes: Pearson's, as `np.corrcoef` computes it, in float64."""
    known = _vary(predicted, true)
    pairs = np.stack([predicted, true], -2).astype(np.float64)
    pairs -= pairs.mean(-1, keepdims=True)
    products = pairs @ pairs.swapaxes(-1, -2) * np.true_divide(1, max(pairs.shape[-1] - 1, 1))
    variances = np.where(known[..., None], np.diagonal(products, axis1=-2, axis2=-1), 1)
    first, second = np.moveaxis(np.sqrt(variances), -1, 0)
    return np.where(known, np.clip(products[..., 0, 1] / first / second, -1, 1), 0)


def pearson(predicted: Array, true: Array) -> Array:
    """Pearson's correlation; scipy's, whose last bits are not those of `np.corrcoef`."""
    known = _vary(predicted, true)
    if not known.any():
        return np.zeros(known.shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConstantInputWarning)
        result = pearsonr(predicted.astype(np.float64), true.astype(np.float64), axis=-1)
    return np.where(known, result.statistic, 0)


def spearman(predicted: Array, true: Array) -> Array:
    """Spearman's correlation; ties have their mean rank."""
    return matthews(rankdata(true, axis=-1), rankdata(predicted, axis=-1))


def _vary(predicted: Array, true: Array) -> Array:
    return (np.ptp(predicted, -1) > 0) & (np.ptp(true, -1) > 0)


METRICS = {"accuracy": accuracy, "f1": f1, "matthews_correlation": matthews}
METRICS |= {"pearson": pearson, "spearmanr": spearman}  # of a regression


def scores(names: Iterable[str], predicted: Array, true: Array) -> dict[str, Array]:
    """{metric: scores (...)}; of several metrics also their mean, "combined_score"."""
    values = {name: METRICS[name](predicted, true) for name in names}
    if len(values) > 1:
        values["combined_score"] = np.mean([*values.values()], axis=0)
    return values
