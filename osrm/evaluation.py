"""Scores of a model on a task, under run_glue.py's names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from osrm import processes
from osrm.glue import GlueMetric, GlueTask, collator, predicted

Predictions = dict[str, tuple[np.ndarray, np.ndarray]]
"""{suffix of the metrics: (predicted classes or values (n,), true ones (n,))}"""


@torch.no_grad()
def predict(
    model: Any, dataset: Dataset, tokenizer: Any, batch_size: int, title: str
) -> tuple[np.ndarray, np.ndarray]:
    """Logits (n, labels) and labels (n,) of a tokenised data set, in its order.

    Several processes share the work, and each returns all of it.
    """
    order = np.argsort(-np.asarray(dataset["length"]), kind="stable")  # least padding
    count = processes.count()
    # As many examples for each: a sharded model waits for all processes in every forward pass.
    shares = np.resize(order, (-(-len(order) // count), count)).T
    loader = DataLoader(
        dataset.select(shares[processes.rank()]),
        batch_size=batch_size,
        collate_fn=collator(tokenizer),
    )
    low = model.dtype if model.dtype in (torch.bfloat16, torch.float16) else None
    logits = []
    training = model.training
    model.eval()
    with torch.autocast(model.device.type, dtype=low, enabled=low is not None):
        for batch in tqdm(
            loader, desc=title, unit="batch", leave=False, disable=not processes.is_first()
        ):
            inputs = {k: v.to(model.device) for k, v in batch.items() if k != "labels"}
            logits.append(model(**inputs).logits.float().cpu())
    model.train(training)
    parts = processes.gathered(torch.cat(logits).numpy())
    outputs = np.empty((len(order), parts[0].shape[1]), parts[0].dtype)
    for share, part in zip(shares, parts, strict=True):
        outputs[share] = part
    return outputs, np.asarray(dataset["labels"])


def predict_splits(
    model: Any,
    task: GlueTask,
    validation: Mapping[str, Dataset],
    tokenizer: Any,
    batch_size: int,
    title: str | None = None,
) -> Predictions:
    """What the model predicts on every validation split, beside what is true."""
    found = {}
    for suffix, dataset in validation.items():
        logits, labels = predict(
            model, dataset, tokenizer, batch_size, title or f"evaluate {task.name}{suffix}"
        )
        found[suffix] = predicted(task, logits), labels
    return found


def scores(task: GlueTask, predictions: Predictions) -> dict[str, float]:
    """{"eval_accuracy": ...} of every validation split; MNLI's mismatched names end in `_mm`."""
    metrics: dict[str, float] = {}
    for suffix, (found, true) in predictions.items():
        values = GlueMetric(task.name).compute(predictions=found, references=true)
        metrics |= {f"eval_{name}{suffix}": value for name, value in values.items()}
        metrics[f"eval_samples{suffix}"] = len(true)
    return metrics
