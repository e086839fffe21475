"""The table of the eight GLUE tasks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from osrm import metrics
from osrm.errors import UserError


@dataclass(frozen=True)
class GlueTask:
    """One task; `labels` is empty for a regression."""

    name: str
    fields: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)

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
        GlueTask("stsb", _PAIR, (), ("pearson", "spearmanr")),
    )
}


def find_tasks(names: Iterable[str], field: str) -> list[GlueTask]:
    """The tasks of these names, each once; `field` names the origin of the names in errors."""
    names = list(dict.fromkeys(names))
    if unknown := [name for name in names if name not in TASKS]:
        raise UserError(f"{field}: unknown task {', '.join(unknown)}; the tasks are {[*TASKS]}")
    return [TASKS[name] for name in names]


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
