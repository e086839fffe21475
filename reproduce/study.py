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
    """One start minus another, paired by seed: × 100."""

    mean: float
    low: float
    high: float
    seeds: tuple[int, ...]

    def __str__(self) -> str:
        text = f"{self.mean:+.1f} [{self.low:+.1f}, {self.high:+.1f}]"
        return f"{text}, one seed" if len(self.seeds) == 1 else text

    @property
    def verdict(self) -> str:
        """Whether it is above 0, as far as the interval tells."""
        return self.above(0)

    @property
    def sign(self) -> str:
        """Higher or lower, as far as the interval tells; one seed does not."""
        if self.low == self.high == 0:
            return "equal"
        if len(self.seeds) == 1 or self.low <= 0 <= self.high:
            return "undecided"
        return "higher" if self.low > 0 else "lower"

    def above(self, bound: float) -> str:
        """Whether it is above a bound; one seed is no verdict, since seeds differ."""
        if len(self.seeds) > 1 and self.low > bound:
            return "shows here"
        if len(self.seeds) > 1 and self.high <= bound:
            return "does not show here"
        return "undecided here"


class Study:
    """All runs of a study that are there."""

    def __init__(self, directory: Path) -> None:
        """Read every record; predictions only when they are asked for."""
        self.directory, self.name = directory, directory.name
        self.problems: dict[str, None] = {}
        """What of the results could not be used, and why, in the order in which it was met."""
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

    def predictions(self, run: str, seed: int) -> pd.DataFrame | None:
        """Every prediction on a reported example, if they are there: merge.py's own file."""
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
        """{row: average score (resamples,)}, once a run whose predictions are there."""
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
            relative: divided by the second, in percent.
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
        """Whether two runs were scored on the same examples; if not, it is said once."""
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
    """Of one difference a seed, × 100, by Student's t: for what has no predictions to draw from."""
    if len(differences) < 2:
        return None
    values = [100 * each for each in differences.values()]
    return Difference(mean(values), *seed_interval(values), tuple(differences))


def spread(values: Sequence[float], factor: float = 100, digits: int = 1) -> str:
    """Mean ± standard deviation over the seeds."""
    if not values:
        return "–"
    text = f"{factor * mean(values):.{digits}f}"
    return f"{text} ± {factor * stdev(values):.{digits}f}" if len(values) > 1 else text


def area(grid: Sequence[float], scores: Sequence[float]) -> float:
    """The mean height of the curve of a score against λ, by trapezoids."""
    return float(np.trapezoid(scores, grid)) / (grid[-1] - grid[0])
