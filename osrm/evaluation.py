"""Predictions and scores of a model on a task, under run_glue.py's names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from osrm import processes
from osrm.data import Encoded, collator
from osrm.glue import GlueTask, predicted, task_scores

# {suffix of the metrics: (predicted classes or values (n,), true ones (n,))}
Predictions = dict[str, tuple[np.ndarray, np.ndarray]]


Outputs = Callable[[Any, dict[str, Tensor]], Tensor]


def class_logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Logits (n, labels) of a batch, without a look at its labels."""
    return model(**{name: x for name, x in batch.items() if name != "labels"}).logits.float()


@torch.no_grad()
def predict(
    model: Any,
    encoded: Encoded,
    tokenizer: Any,
    batch_size: int,
    *,
    title: str,
    outputs: Outputs = class_logits,
) -> tuple[np.ndarray, np.ndarray]:
    """Outputs (n, k) and labels (n,) of tokenised examples, in their order.

    Several processes share the work, and every one returns the whole result.
    """
    order = np.argsort(-np.asarray(encoded.lengths), kind="stable")  # least padding
    count = processes.count()
    # Equal shares, because all processes of a sharded model take part in every forward pass.
    shares = np.resize(order, (-(-len(order) // count), count)).T
    share = Subset(encoded, shares[processes.rank()].tolist())
    loader = DataLoader(
        share, batch_size, collate_fn=collator(tokenizer), pin_memory=torch.cuda.is_available()
    )
    quiet, low = not processes.is_first(), model.dtype in (torch.bfloat16, torch.float16)
    rows, training = [], model.training
    model.eval()
    with torch.autocast(model.device.type, dtype=model.dtype if low else None, enabled=low):
        for batch in tqdm(loader, desc=title, unit="batch", leave=False, disable=quiet):
            batch = send_to_device(dict(batch), model.device, non_blocking=True)
            rows.append(outputs(model, batch))
    model.train(training)
    parts = processes.gathered(torch.cat(rows).cpu().numpy())
    result = np.empty((len(order), parts[0].shape[1]), parts[0].dtype)
    for indices, part in zip(shares, parts, strict=True):
        result[indices] = part
    return result, np.asarray(encoded.datasets["labels"])


def predict_splits(
    model: Any,
    task: GlueTask,
    validation: Mapping[str, Encoded],
    tokenizer: Any,
    *,
    batch_size: int,
    title: str | None = None,
) -> Predictions:
    """The model's predictions on every validation split, with the true values."""
    predictions = {}
    for suffix, encoded in validation.items():
        bar = title or f"evaluate {task.name}{suffix}"
        logits, labels = predict(model, encoded, tokenizer, batch_size, title=bar)
        predictions[suffix] = predicted(task, logits), labels
    return predictions


def scores(task: GlueTask, predictions: Predictions) -> dict[str, float]:
    """{"eval_accuracy": ...} of every validation split; MNLI's mismatched names end in `_mm`."""
    metrics: dict[str, float] = {}
    for suffix, (values, true) in predictions.items():
        for name, score in task_scores(task, values, true).items():
            metrics[f"eval_{name}{suffix}"] = score
        metrics[f"eval_samples{suffix}"] = len(true)
    return metrics
