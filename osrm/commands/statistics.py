"""What RegMean and Fisher merging look at: each task's own model on its own training examples."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from osrm.adapters import applied, load_head
from osrm.checkpoints import Checkpoint, checksum
from osrm.features import cache_path, task_features
from osrm.fisher import fisher_information
from osrm.glue import collator, feature_batches, fingerprint
from osrm.merging import Lazy
from osrm.task_vectors import dense
from osrm.tensor_file import TensorFile, cached

if TYPE_CHECKING:
    from osrm.commands.scoring import Evaluation


def collect_statistics(
    needs: str, evaluation: Evaluation, checkpoints: Mapping[str, Checkpoint], modules: list[str]
) -> Lazy[Any]:
    """By module, what a method of these needs takes as its statistics; each task's is cached.

    Args:
        needs: "moments" or "fisher".
        evaluation: with training examples.
    """
    files = {}
    for task, checkpoint in checkpoints.items():
        model = evaluation.model(task)
        load_head(model, checkpoint.head)
        own = {module: dense(update) for module, update in checkpoint.updates.items()}
        with applied(model, own):
            collect = {"moments": _moments, "fisher": _fisher}[needs]
            files[task] = collect(evaluation, task, checkpoint, model, modules)
        del model, own  # or they would lie beside the next ones
    if needs == "moments":
        return Lazy(modules, lambda module: [file[module] for file in files.values()])
    return Lazy(modules, lambda module: torch.stack([file[module] for file in files.values()]))


def _settings(evaluation: Evaluation, task: str, checkpoint: Checkpoint) -> dict[str, Any]:
    """All that the statistics depend on beside the modules."""
    return {
        "task": task,
        "backbone": evaluation.backbone.name,
        "body_fingerprint": checkpoint.args.get("body_fingerprint"),
        "adapter": checksum(checkpoint.path),
        "features": "token",
        "count_padding": evaluation.count_padding,
        "max_seq_len": evaluation.settings[task]["max_seq_len"],
        "dtype": str(evaluation.dtype),
        "data": fingerprint(evaluation.train[task]),
    }


def _moments(
    evaluation: Evaluation, task: str, checkpoint: Checkpoint, model: Any, modules: list[str]
) -> Mapping[str, Any]:
    examples = evaluation.train[task]
    settings = _settings(evaluation, task, checkpoint)
    pad_to = settings["max_seq_len"] if evaluation.count_padding else None
    batch_size = evaluation.settings[task]["batch_size"]
    batches = feature_batches(examples, evaluation.tokenizer, batch_size, pad_to)
    return task_features(settings, model, modules, batches)


def _fisher(
    evaluation: Evaluation, task: str, checkpoint: Checkpoint, model: Any, modules: list[str]
) -> Mapping[str, Tensor]:
    settings = {**_settings(evaluation, task, checkpoint), "what": "fisher"}

    def write(path: Path) -> None:
        loader = DataLoader(evaluation.train[task], collate_fn=collator(evaluation.tokenizer))
        shown = tqdm(loader, desc=f"Fisher information of {task}", unit="example")
        found = fisher_information(model, modules, shown)
        TensorFile.save(path, found, {"settings": settings})

    return cached(cache_path(settings, modules), TensorFile, write)
