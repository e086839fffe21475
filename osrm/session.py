"""What training, transforming and merging share: the base model, each task's data, the scoring."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pandas import DataFrame
from torch import Tensor
from transformers import set_seed

from osrm.backbones import Backbone, body_fingerprint, load_model
from osrm.bank import FeatureFile, task_features
from osrm.data import Encoded, TaskData, feature_batches, fingerprint, tokenize
from osrm.evaluation import Predictions, predict_splits, scores
from osrm.glue import GlueTask
from osrm.lending import load_head
from osrm.seeds import derive_seed


@dataclass(frozen=True)
class Session:
    """One base model and the data of its tasks, loaded and checked before any long work."""

    backbone: Backbone
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    """Of the base model's weights."""
    seed: int
    batch_size: int
    """Of scoring, and of the passes that collect statistics."""
    tasks: Mapping[str, GlueTask]
    max_seq_len: Mapping[str, int]
    """{task: tokens an example}"""
    data: Mapping[str, TaskData]
    """{task: its examples as texts}"""

    def model(self, task: GlueTask, head: Mapping[str, Tensor] | None = None) -> Any:
        """The base model with this head, or with a new one that depends on the seed and task."""
        set_seed(derive_seed(self.seed, task.name, "head"))
        model = load_model(self.backbone, task.labels, self.tokenizer, self.dtype).to(self.device)
        if head is not None:
            load_head(model, head)
        return model

    def encoded(self, task: GlueTask, examples: DataFrame) -> Encoded:
        """The examples as token ids."""
        return tokenize(examples, task, self.tokenizer, self.max_seq_len[task.name])

    def tokenized(self, task: GlueTask) -> TaskData:
        """All examples of the task as token ids."""
        data = self.data[task.name]
        train, selection = (self.encoded(task, part) for part in (data.train, data.selection))
        return TaskData(train, selection, self.encoded_splits(task))

    def encoded_splits(self, task: GlueTask) -> dict[str, Encoded]:
        """{suffix of the metrics: token ids} of the task's reported examples."""
        splits = self.data[task.name].validation
        return {suffix: self.encoded(task, split) for suffix, split in splits.items()}

    def predict(
        self, model: Any, task: GlueTask, splits: Mapping[str, Encoded], title: str | None = None
    ) -> Predictions:
        """What a model with the task's head predicts on `encoded` splits."""
        return predict_splits(
            model, task, splits, self.tokenizer, batch_size=self.batch_size, title=title
        )

    def scores(self, task: GlueTask, predictions: Predictions) -> dict[str, float]:
        """All metrics of what was predicted, {"eval_accuracy": ...}."""
        return scores(task, predictions)

    def rows(self, encoded: Encoded) -> int:
        """How many of these examples a batch may have."""
        return self.batch_size

    def key(self, model: Any, task: GlueTask, frame: DataFrame, **settings: Any) -> dict[str, Any]:
        """All that a statistic of the model on these examples depends on, but for the layers."""
        return {
            "backbone": self.backbone.name,
            "body_fingerprint": body_fingerprint(model),
            "max_seq_len": self.max_seq_len[task.name],
            **settings,
            "seed": self.seed,
            "task": task.name,
            "samples": len(frame),
            "data": fingerprint(frame),
        }

    def statistics(
        self,
        model: Any,
        modules: list[str],
        key: Mapping[str, Any],
        examples: DataFrame,
        *,
        path: Path | None = None,
    ) -> FeatureFile:
        """The second moments of what enters these layers on the examples; cached without `path`.

        The settings of `key` have "features" and "count_padding".
        """
        pad_to = key["max_seq_len"] if key["count_padding"] else None
        encoded = self.encoded(self.tasks[key["task"]], examples)
        batches = feature_batches(encoded, self.tokenizer, self.rows(encoded), pad_to)
        file = task_features(key, model, modules, batches, path=path)
        file.device = self.device
        return file
