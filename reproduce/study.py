"""Read the results of a study: reproduce/results/<study>/<run>/<seed>.json and .parquet."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import pandas as pd
from intervals import Difference, holm, student
from plan import STARTS, STUDIES

from osrm import metrics
from osrm.data import known_tasks

Array = np.ndarray
TASKS = known_tasks("mini-16")
"""GLUE's, and the embedded ones."""

TITLES = {
    "gaussian": "LoRA",
    "kaiming": "LoRA, kaiming",
    "gaussian-norm1": "LoRA, norm 1",
    "orthogonal": "random frame",
    "analytical": "OSRM",
    "contrastive": "contrastive (ours)",
    "contrastive-shift": "contrastive, shift penalty (ours)",
    "release": "the release's code",
}


REFERENCES = ("pre-trained", "individual")
"""The rows that are no merge."""


def score(task: str, predicted: Array, true: Array) -> Array:
    """The task's score (...) of predictions and labels (..., examples)."""
    return metrics.scores(TASKS[task].metrics, predicted, true)[TASKS[task].score]


class Study:
    """All finished runs of a study."""

    def __init__(self, directory: Path) -> None:
        """Read every record. Predictions are read when they are needed."""
        self.directory, self.name = directory, directory.name
        self.problems: dict[str, None] = {}
        """Results that could not be used, and why; a dict keeps each once, in order."""
        self.records: dict[str, dict[int, dict[str, Any]]] = {}
        for path in sorted(directory.glob("*/*.json")):
            try:
                record = json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                self.problems[f"{path.parent.name}/{path.name} is not whole; it is left out."] = (
                    None
                )
                continue
            add_measures(record["rows"])
            self.records.setdefault(path.parent.name, {})[int(path.stem)] = record
        self.settings: dict[str, Any] = STUDIES.get(self.name, {})
        self._predictions: dict[tuple[str, int], pd.DataFrame | None] = {}

    @property
    def starts(self) -> list[str]:
        """The starts that have results, in the order of questions.yaml."""
        return [start for start in STARTS if start in self.records]

    @cached_property
    def rows(self) -> list[str]:
        """The rows of the main table: pre-trained, individual, and the methods."""
        names: dict[str, None] = {}
        for start in self.starts:
            for record in self.records[start].values():
                names |= dict.fromkeys(row["name"] for row in record["rows"])
        return [*names]

    def values(self, run: str, row: str, what: str = "average") -> dict[int, float]:
        """{seed: one number of a row}; `what` is of the record or of `add_measures`."""
        return {
            seed: line[what]
            for seed, record in self.records.get(run, {}).items()
            for line in record["rows"]
            if line["name"] == row and line.get(what) is not None
        }

    def scores(self, run: str, row: str) -> dict[str, list[float]]:
        """{task: the score of every seed}."""
        scores: dict[str, list[float]] = {}
        for record in self.records.get(run, {}).values():
            for line in record["rows"]:
                if line["name"] == row:
                    for task, score in line["scores"].items():
                        scores.setdefault(task, []).append(score)
        return scores

    def scales(self, run: str, method: str) -> list[float]:
        """The chosen λ of every seed."""
        searches = [record["search"] for record in self.records.get(run, {}).values()]
        return [search[method]["best"] for search in searches if method in search]

    def predictions(self, run: str, seed: int) -> pd.DataFrame | None:
        """merge.py's predictions.parquet of one run; None if it is missing or damaged."""
        key = run, seed
        if key not in self._predictions:
            path = self.directory / run / f"{seed}.parquet"
            try:
                self._predictions[key] = pd.read_parquet(path)
            except (OSError, ValueError):
                self._predictions[key] = None
                self.problems[f"{run}/{path.name} is not there or not whole; not paired."] = None
        return self._predictions[key]

    def paired(self, run: str, other: str) -> list[int]:
        """The seeds that both have on the same examples."""
        seeds = self.records.get(run, {}).keys() & self.records.get(other, {}).keys()
        return [seed for seed in sorted(seeds) if self.comparable(run, other, seed)]

    def differences(self, run: str, other: str, what: str = "average") -> dict[str, Difference]:
        """{row: the first run minus the second, paired by seed}.

        The merging methods of one comparison are a family: their p are corrected by Holm.
        """
        seeds, found = self.paired(run, other), {}
        for row in self.rows:
            ours, theirs = self.values(run, row, what), self.values(other, row, what)
            both = shared(seeds, ours, theirs)
            if each := student({seed: ours[seed] - theirs[seed] for seed in both}):
                found[row] = each
        alone = {row: found.pop(row) for row in REFERENCES if row in found}
        return alone | holm(found)

    def comparable(self, run: str, other: str, seed: int) -> bool:
        """Whether two runs were scored on the same examples; if not, note the problem."""
        one, two = self.predictions(run, seed), self.predictions(other, seed)
        if one is None or two is None:
            return False
        columns = ["task", "split", "example", "label"]
        same = one[columns].equals(two[columns])
        if not same:
            what = f"{run} and {other}, seed {seed}: other examples or labels; not paired."
            self.problems[what] = None
        return same


def add_measures(rows: list[dict[str, Any]]) -> None:
    """Add to each row its merging loss, individual − merged, and its averages without a task."""
    individual = next((row["average"] for row in rows if row["name"] == "individual"), None)
    for row in rows:
        if individual is not None and row["name"] not in REFERENCES:
            row["loss"] = individual - row["average"]
        for task in row["scores"]:
            rest = [score for other, score in row["scores"].items() if other != task]
            row[f"without {task}"] = mean(rest) if rest else None


def shared(*seeds: Iterable[int]) -> list[int]:
    """The seeds that all have."""
    return sorted(set.intersection(*map(set, seeds)))


def spread(values: Sequence[float], factor: float = 100, digits: int = 1) -> str:
    """Mean ± standard deviation over the seeds."""
    if not values:
        return "–"
    text = f"{factor * mean(values):.{digits}f}"
    return f"{text} ± {factor * stdev(values):.{digits}f}" if len(values) > 1 else text


def area(grid: Sequence[float], scores: Sequence[float]) -> float:
    """The mean height of the curve of a score against λ, by the trapezoidal rule."""
    return float(np.trapezoid(scores, grid)) / (grid[-1] - grid[0])
