"""The table of the eight GLUE tasks, and the tasks of a tasks.json."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from osrm import metrics
from osrm.checks import Check, nonempty, one_of, problems, read_object, set_of, task_name
from osrm.errors import UserError

LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class GlueTask:
    """One task; `labels` is empty for a regression, whose labels lie in the range `values`."""

    name: str
    fields: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    values: tuple[float, float] = field(default=(-LARGEST, LARGEST), compare=False)

    @property
    def num_labels(self) -> int:
        """Outputs of the head."""
        return len(self.labels) or 1

    @property
    def score(self) -> str:
        """The metric in the paper's tables."""
        return "combined_score" if len(self.metrics) > 1 else self.metrics[0]

    @property
    def select(self) -> str:
        """The metric that selects the best epoch."""
        return "accuracy" if "accuracy" in self.metrics else self.score

    @property
    def validation_splits(self) -> dict[str, str]:
        """{suffix of the metric names: split}; `_mm` as in run_glue.py: MNLI's mismatched one."""
        if self.name == "mnli":
            return {"": "validation_matched", "_mm": "validation_mismatched"}
        return {"": "validation"}


_F1 = ("accuracy", "f1")
_CORRELATIONS = ("pearson", "spearmanr")
_PAIR = ("sentence1", "sentence2")
_NLI = ("entailment", "not_entailment")
_MNLI = ("entailment", "neutral", "contradiction")
TASKS = {
    task.name: task
    for task in (
        GlueTask("mrpc", _PAIR, ("not_equivalent", "equivalent"), _F1),
        GlueTask("qnli", ("question", "sentence"), _NLI),
        GlueTask("qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), _F1),
        GlueTask("rte", _PAIR, _NLI),
        GlueTask("sst2", ("sentence",), ("negative", "positive")),
        GlueTask("mnli", ("premise", "hypothesis"), _MNLI),
        GlueTask("cola", ("sentence",), ("unacceptable", "acceptable"), ("matthews_correlation",)),
        GlueTask("stsb", _PAIR, (), _CORRELATIONS, values=(0, 5)),
    )
}


_COLUMN = Check(
    "the name of a column other than 'label'", lambda x: nonempty.holds(x) and x != "label"
)
_ENTRY = {
    "the name": task_name,
    "fields": set_of(_COLUMN, "one or two", lambda count: 0 < count < 3),
    "labels": set_of(nonempty, "none (a regression) or several", lambda count: count != 1),
}
_METRICS = {0: _CORRELATIONS, 2: ("accuracy", "f1", "matthews_correlation")}  # by classes


def read_tasks(path: Path) -> dict[str, GlueTask]:
    """The tasks of a tasks.json, {name: {"fields": [...], "labels": [...], "metrics": [...]}}.

    Raises UserError that names every task that is wrong, and its field.
    """
    tasks, wrong = {}, []
    for name, entry in read_object(path, "--data-dir", "{task: definition}").items():
        try:
            tasks[name] = _task(name, entry)
        except UserError as error:
            wrong.append(f"'{name}': {error}")
    if wrong:
        raise UserError(f"--data-dir {path}: {'; '.join(wrong)}; correct the file")
    return tasks


def _task(name: str, entry: Any) -> GlueTask:
    if not isinstance(entry, dict) or {*entry, "metrics"} != {"fields", "labels", "metrics"}:
        raise UserError("expected an object of fields, labels and perhaps metrics")
    if wrong := problems({"the name": name, **entry}, _ENTRY):
        raise UserError("; ".join(wrong))
    classes = len(entry["labels"])
    fitting = _METRICS.get(classes, ("accuracy",))
    values = {"metrics": ["accuracy"] if classes else [*fitting], **entry}
    several = set_of(one_of(*fitting), "at least one", lambda count: count > 0)
    if wrong := problems(values, {"metrics": several}):
        raise UserError(f"{wrong[0]}, for {classes} labels")
    task = GlueTask(name, *(tuple(values[key]) for key in ("fields", "labels", "metrics")))
    if (known := TASKS.get(name, task)) != task:
        raise UserError("GLUE has another task of this name; rename yours and its folder")
    return known


def task_metrics(task: GlueTask, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """GLUE's metrics of a model's outputs, logits (n, labels)."""
    return task_scores(task, predicted(task, logits), labels)


def task_scores(task: GlueTask, predicted: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """GLUE's metrics of predicted classes or values (n,)."""
    values = metrics.scores(task.metrics, predicted, true)
    return {name: float(value) for name, value in values.items()}


def predicted(task: GlueTask, logits: np.ndarray) -> np.ndarray:
    """The class of each example, or the value of a regression (n,), of logits (n, labels)."""
    return logits.argmax(-1) if task.labels else logits[:, 0]
