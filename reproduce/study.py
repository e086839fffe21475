"""Read the results of a study: reproduce/results/<study>/<run>/<seed>.json and .parquet."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import pandas as pd
from bootstrap import example_resamples, interval, seed_interval
from plan import STARTS, STUDIES

TITLES = {
    "gaussian": "LoRA",
    "gaussian-norm1": "LoRA, norm 1",
    "orthogonal": "random frame",
    "analytical": "OSRM",
    "contrastive": "contrastive (ours)",
    "release": "the release's code",
}


@dataclass(frozen=True)
class Difference:
    """One start minus another, paired by seed, × 100, with its interval."""

    mean: float
    low: float
    high: float
    seeds: tuple[int, ...]

    def __str__(self) -> str:
        text = f"{self.mean:+.1f} [{self.low:+.1f}, {self.high:+.1f}]"
        return f"{text}, one seed" if len(self.seeds) == 1 else text

    @property
    def verdict(self) -> str:
        """Whether the interval is above 0."""
        return self.above(0)

    @property
    def sign(self) -> str:
        """Higher or lower if the interval excludes 0; undecided with one seed."""
        if self.low == self.high == 0:
            return "equal"
        if len(self.seeds) == 1 or self.low <= 0 <= self.high:
            return "undecided"
        return "higher" if self.low > 0 else "lower"

    def above(self, bound: float) -> str:
        """Whether the interval is above a bound; undecided with one seed."""
        if len(self.seeds) > 1 and self.low > bound:
            return "shows here"
        if len(self.seeds) > 1 and self.high <= bound:
            return "does not show here"
        return "undecided here"


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
            self.records.setdefault(path.parent.name, {})[int(path.stem)] = record
        self.settings: dict[str, Any] = STUDIES.get(self.name, {})
        self._predictions: dict[tuple[str, int], pd.DataFrame | None] = {}
        self._resamples: dict[tuple[str, int], Mapping[str, Any]] = {}

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
        """{seed: one number of a row}; `what` may be normalised_average, merge_seconds, ..."""
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

    def resamples(self, run: str, seed: int) -> Mapping[str, Any]:
        """{row: average score (resamples,)} of a run that has predictions; computed once."""
        key = run, seed
        if key not in self._resamples:
            rows = [row["name"] for row in self.records[run][seed]["rows"]]
            self._resamples[key] = example_resamples(self.predictions(run, seed), rows)
        return self._resamples[key]

    def difference(
        self, run: str, other: str, row: str, relative: bool = False
    ) -> Difference | None:
        """The first run minus the second, over the seeds that both have on the same examples.

        Args:
            relative: divide by the second, in percent.
        """
        first, second = self.values(run, row), self.values(other, row)
        seeds = sorted(
            seed for seed in first.keys() & second.keys() if self.comparable(run, other, seed)
        )
        if not seeds:
            return None

        def compare(ours: Any, theirs: Any) -> Any:
            return (ours - theirs) / theirs if relative else ours - theirs

        low, high = interval(
            {
                seed: compare(self.resamples(run, seed)[row], self.resamples(other, seed)[row])
                for seed in seeds
            }
        )
        middle = mean(compare(first[seed], second[seed]) for seed in seeds)
        return Difference(100 * middle, 100 * low, 100 * high, tuple(seeds))

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


def over_seeds(differences: Mapping[int, float]) -> Difference | None:
    """One difference per seed, × 100, with Student's interval: for values without predictions."""
    if len(differences) < 2:
        return None
    values = [100 * difference for difference in differences.values()]
    return Difference(mean(values), *seed_interval(values), tuple(differences))


def spread(values: Sequence[float], factor: float = 100, digits: int = 1) -> str:
    """Mean ± standard deviation over the seeds."""
    if not values:
        return "–"
    text = f"{factor * mean(values):.{digits}f}"
    return f"{text} ± {factor * stdev(values):.{digits}f}" if len(values) > 1 else text


def area(grid: Sequence[float], scores: Sequence[float]) -> float:
    """The mean height of the curve of a score against λ, by the trapezoidal rule."""
    return float(np.trapezoid(scores, grid)) / (grid[-1] - grid[0])
