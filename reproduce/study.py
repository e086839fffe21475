"""The results of a study, read: reproduce/results/<study>/<run>/<seed>.json and .parquet."""

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
from bootstrap import example_resamples, interval
from plan import STARTS, STUDIES

TITLES = {
    "gaussian": "LoRA",
    "gaussian-norm1": "LoRA, norm 1",
    "orthogonal": "random frame",
    "analytical": "OSRM",
    "contrastive": "contrastive (ours)",
    "release": "release",
}


@dataclass(frozen=True)
class Difference:
    """One start minus another, paired by seed: score × 100."""

    mean: float
    low: float
    high: float
    seeds: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.mean:+.1f} [{self.low:+.1f}, {self.high:+.1f}]"

    @property
    def verdict(self) -> str:
        """Whether it is above 0, as far as the interval tells."""
        return (
            "shows here"
            if self.low > 0
            else "undecided here"
            if self.high > 0
            else "does not show here"
        )


class Study:
    """All runs of a study that are there."""

    def __init__(self, directory: Path) -> None:
        """Read every record; predictions only when they are asked for."""
        self.directory, self.name = directory, directory.name
        self.records: dict[str, dict[int, dict[str, Any]]] = {}
        for path in sorted(directory.glob("*/*.json")):
            record = json.loads(path.read_text(encoding="utf-8"))
            self.records.setdefault(path.parent.name, {})[int(path.stem)] = record
        self.settings: dict[str, Any] = STUDIES.get(self.name, {})
        self._resamples: dict[tuple[str, int], Mapping[str, Any]] = {}

    @property
    def starts(self) -> list[str]:
        """Those that have results, in the order of questions.yaml."""
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
        """{seed: average, normalised_average, merge_seconds, ... of one row}."""
        found = {}
        for seed, record in self.records.get(run, {}).items():
            for each in record["rows"]:
                if each["name"] == row and each.get(what) is not None:
                    found[seed] = each[what]
        return found

    def scores(self, run: str, row: str) -> dict[str, list[float]]:
        """{task: the score of every seed}."""
        found: dict[str, list[float]] = {}
        for record in self.records.get(run, {}).values():
            for each in record["rows"]:
                if each["name"] == row:
                    for task, score in each["scores"].items():
                        found.setdefault(task, []).append(score)
        return found

    def scales(self, run: str, method: str) -> list[float]:
        """The λ that were chosen."""
        records = self.records.get(run, {}).values()
        return [each["search"][method]["best"] for each in records if method in each["search"]]

    def predictions(self, run: str, seed: int) -> pd.DataFrame:
        """Every prediction on a reported example: see merge.py's predictions.parquet."""
        return pd.read_parquet(self.directory / run / f"{seed}.parquet")

    def resamples(self, run: str, seed: int) -> Mapping[str, Any]:
        """{row: average score (resamples,)}, once a run."""
        key = run, seed
        if key not in self._resamples:
            rows = [row["name"] for row in self.records[run][seed]["rows"]]
            self._resamples[key] = example_resamples(self.predictions(run, seed), rows)
        return self._resamples[key]

    def difference(self, run: str, other: str, row: str) -> Difference | None:
        """The first run minus the second, over the seeds that both have on the same examples."""
        first, second = self.values(run, row), self.values(other, row)
        seeds = [seed for seed in first.keys() & second.keys() if self.comparable(run, other, seed)]
        if not seeds:
            return None
        low, high = interval(
            {
                seed: self.resamples(run, seed)[row] - self.resamples(other, seed)[row]
                for seed in sorted(seeds)
            }
        )
        middle = mean(first[seed] - second[seed] for seed in seeds)
        return Difference(100 * middle, 100 * low, 100 * high, tuple(sorted(seeds)))

    def comparable(self, run: str, other: str, seed: int) -> bool:
        """Whether two runs were scored on the same examples."""
        one, two = (
            self.predictions(each, seed)[["task", "split", "example", "label"]]
            for each in (run, other)
        )
        return one.equals(two)


def spread(values: Sequence[float], factor: float = 100, digits: int = 1) -> str:
    """Mean ± standard deviation over the seeds."""
    if not values:
        return "–"
    text = f"{factor * mean(values):.{digits}f}"
    return f"{text} ± {factor * stdev(values):.{digits}f}" if len(values) > 1 else text


def area(grid: Sequence[float], scores: Sequence[float]) -> float:
    """The mean height of the curve of a score against λ, by trapezoids."""
    return float(np.trapezoid(scores, grid)) / (grid[-1] - grid[0])
