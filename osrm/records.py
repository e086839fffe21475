"""What merge.py writes as JSON, as values: recipe.json and results.json."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from osrm.backbones import CLASSIFIER, Kind
from osrm.checks import Check, flag, one_of, optional, problems, read_object, text, whole
from osrm.errors import UserError
from osrm.merging import check_knobs

RECIPE, RESULTS = "recipe.json", "results.json"
STEP = 1.5
"""The factor from the best λ at the edge of a grid to the next one."""


@dataclass(frozen=True)
class Measure:
    """What the scores of a table are, and how they are shown."""

    name: str
    best: Callable[..., Any]
    """`max` or `min`: of several scores the best."""
    factor: int
    """Scores are shown times this."""
    form: str
    """The format of a score."""
    unit: str


SCORE = Measure("score", max, 100, ".1f", "× 100")
LOSS = Measure("loss", min, 1, ".3f", "nats per token")


@dataclass(frozen=True)
class Search:
    """How one method's λ was chosen."""

    grid: list[float]
    """The λ that were tried."""
    scores: dict[str, list[float]]
    """{task: its score with each λ}"""
    average: list[float]
    """Over the tasks, with each λ."""
    best: float
    knobs: dict[str, Any]
    """What else was chosen, such as {"density": 0.2}: grid and scores belong to it."""
    chosen_on: str = "held-out data"

    @classmethod
    def choose(
        cls,
        curves: dict[str, dict[float, float]],
        knobs: dict[str, Any],
        measure: Measure = SCORE,
    ) -> Search:
        """The λ with the best average over the tasks; of equal ones the smallest.

        Args:
            curves: {task: {λ: score}}
            knobs: what else was chosen
            measure: what is best
        """
        grid = sorted(next(iter(curves.values())))
        scores = {task: [curve[scale] for scale in grid] for task, curve in curves.items()}
        # Rounded: averages that are equal as fractions may differ in their last bit.
        average = [round(mean(values), 12) for values in zip(*scores.values())]
        return cls(grid, scores, average, grid[average.index(measure.best(average))], knobs)

    @property
    def value(self) -> float:
        """The average with the best λ."""
        return self.average[self.grid.index(self.best)]

    def beyond(self) -> float | None:
        """The λ to try next, if the best is at an edge of the grid; None if it is inside."""
        if len(self.grid) > 1 and self.best == self.grid[-1]:
            return float(f"{self.best * STEP:.3g}")
        if len(self.grid) > 1 and self.best == self.grid[0] and self.average[0] != self.average[1]:
            return float(f"{self.best / STEP:.3g}")
        return None


@dataclass(frozen=True)
class Source:
    """One task's checkpoint."""

    path: str
    sha256: str
    labels: tuple[str, ...] = ()
    """The classes of its head; no class: a regression."""
    saved: tuple[str, ...] = ()
    """The modules that it has of its own: PEFT's modules_to_save."""


@dataclass(frozen=True, kw_only=True)
class Merge:
    """What all merges of one command share."""

    backbone: str | None
    base: str | None = None
    """The name of the base model in the adapters."""
    kind: Kind = CLASSIFIER
    dtype: str
    max_num_samples: int
    count_padding: bool
    align_heads: int | None = None
    """The training texts of each task by which its head was fitted to the merge."""
    tasks: dict[str, Source]
    environment: dict[str, Any] = field(default_factory=dict)
    """Versions of packages and of this code."""

    @property
    def measure(self) -> Measure:
        """What the scores of such merges are."""
        return LOSS if self.kind.models_language else SCORE


@dataclass(frozen=True, kw_only=True)
class Recipe(Merge):
    """recipe.json: how one method's merge was made."""

    method: str
    paper: str = ""
    knobs: dict[str, Any]
    search: Search | None = None
    modules: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, path: str | Path, where: str) -> Recipe:
        """Read and check the file that `where`, a flag, names; raises UserError."""
        record = read_object(path, where, "{field: value}")
        there = {*record, "search", "align_heads"}  # these two may be left out
        wrong = [f"lacks {name}" for name in _RECIPE if name not in there]
        try:
            if wrong := wrong or problems(record, _RECIPE):
                raise UserError("; ".join(wrong))
            check_knobs(record["method"], record["knobs"])
        except UserError as error:
            fix = "name the recipe.json of a method's directory"
            raise UserError(f"{where} {path}: {error}; {fix}") from None
        record["tasks"] = {task: _of(Source, source) for task, source in record["tasks"].items()}
        record["search"] = Search(**record["search"]) if "search" in record else None
        record["kind"] = Kind(**record.get("kind", vars(CLASSIFIER)))
        return _of(cls, record)


@dataclass(frozen=True)
class Row:
    """One row of the table: a method, "pre-trained", or "individual"; only methods have costs."""

    name: str
    knobs: dict[str, Any]
    scores: dict[str, float]
    """{task: the score that the paper's tables show}"""
    average: float
    normalised_average: float | None
    """Mean over the tasks of score / score of the task's own adapter, where that is above 0."""
    metrics: dict[str, dict[str, float]]
    """{task: all metrics}"""
    merge_seconds: float | None = None
    merge_peak_gib: float | None = None
    size_mib: float | None = None
    """Of the stored update."""
    condition: float | None = None
    """The largest condition number of RegMean's equations."""
    kept: float | None = None
    """⟨received, own⟩ / ‖own‖² of the tasks' updates, mean over the tasks."""


@dataclass(frozen=True, kw_only=True)
class Results(Merge):
    """results.json: the scores of all merges of one command."""

    init: str
    """The start of A that the adapters share."""
    rows: list[Row]
    search: dict[str, Search]
    """{method: its search for λ}"""
    evaluation: dict[str, dict[str, Any]]
    """{task: data and settings of its scores}"""
    evaluation_peak_gib: float

    def metric(self, task: str) -> str:
        """Which of the task's metrics its scores are: the mean of several, else the first."""
        metrics = [name.removeprefix("eval_") for name in self.rows[0].metrics[task]]
        return "combined_score" if "combined_score" in metrics else metrics[0]

    @classmethod
    def read(cls, path: Path) -> Results:
        """What merge.py wrote; raises UserError if the file holds something else."""
        record = read_object(path, "results", "{field: value}")
        try:
            record["rows"] = [_of(Row, row) for row in record["rows"]]
            record["search"] = {name: Search(**curve) for name, curve in record["search"].items()}
            record["tasks"] = {task: _of(Source, one) for task, one in record["tasks"].items()}
            record["kind"] = Kind(**record.get("kind", vars(CLASSIFIER)))
            return _of(cls, record)
        except (AttributeError, KeyError, TypeError) as error:
            raise UserError(f"{path}: no results.json of merge.py ({error!r})") from None


def record(value: Any) -> Any:
    """Any of these values as JSON; a field that is None by default is left out if it is None."""
    if isinstance(value, dict):
        return {name: record(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [record(item) for item in value]
    if not is_dataclass(value):
        return value
    required = [field.name for field in fields(value) if field.default is MISSING]
    items = vars(value).items()
    return {name: record(item) for name, item in items if item is not None or name in required}


def _of(cls: Any, record: dict[str, Any]) -> Any:
    """The dataclass with what the record has of its fields."""
    return cls(**{name.name: record[name.name] for name in fields(cls) if name.name in record})


def _are_sources(value: Any) -> bool:
    sources = value.values() if isinstance(value, dict) else ()
    return bool(sources) and all(
        isinstance(source, dict) and isinstance(source.get("path"), str) and "sha256" in source
        for source in sources
    )


_RECIPE = {
    "method": text,
    "knobs": Check("{knob: value}", lambda value: isinstance(value, dict)),
    "backbone": optional(text),
    "dtype": one_of("float32", "float64"),
    "max_num_samples": whole(1),
    "count_padding": flag,
    "align_heads": whole(2),
    "tasks": Check('{task: {"path", "sha256"}}', _are_sources),
    "search": Check(
        "what --search writes",
        lambda value: isinstance(value, dict) and value.keys() == Search.__annotations__.keys(),
    ),
}
