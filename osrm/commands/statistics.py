"""What RegMean and Fisher merging look at: each task's own model on its own training examples."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from pandas import DataFrame
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from osrm.bank import cache_path
from osrm.checkpoints import checksum
from osrm.commands.inputs import Inputs
from osrm.data import collator
from osrm.fisher import fisher_information
from osrm.lending import applied
from osrm.records import Merge
from osrm.session import Session
from osrm.task_vectors import Lazy, deltas
from osrm.tensor_file import TensorFile, cached


def collect_statistics(needs: str, session: Session, inputs: Inputs, shared: Merge) -> Lazy[Any]:
    """By module, what a method that needs "moments" or "fisher" takes; each task's is cached."""
    modules = [*inputs.vectors]
    files: list[Mapping[str, Any]] = []
    settings = {"features": "token", "count_padding": shared.count_padding}
    for name, checkpoint in inputs.checkpoints.items():
        task = session.tasks[name]
        train = session.data[name].train.head(shared.max_num_samples)
        model = session.model(task, checkpoint.head)
        key = session.key(model, task, train, **settings, adapter=checksum(checkpoint.path))
        with applied(model, deltas(checkpoint.updates, session.device)):
            if needs == "moments":
                files.append(session.statistics(model, modules, key, train))
            else:
                files.append(_fisher(session, key, model, modules, train=train))
        del model  # or it would stay beside the next task's
    if needs == "moments":
        return Lazy(modules, lambda module: [file[module] for file in files])

    def stacked(module: str) -> Float[Tensor, "task out in"]:
        return torch.stack([file[module] for file in files]).to(session.device)

    return Lazy(modules, stacked)


def _fisher(
    session: Session, key: dict[str, Any], model: Any, modules: list[str], *, train: DataFrame
) -> TensorFile:
    key = {**key, "what": "fisher"}
    task = session.tasks[key["task"]]

    def write(path: Path) -> None:
        examples = session.encoded(task, train)
        collate = collator(session.tokenizer)
        loader = DataLoader(examples, collate_fn=collate, pin_memory=torch.cuda.is_available())
        shown = tqdm(loader, desc=f"Fisher information of {task.name}", unit="example")
        information = fisher_information(model, modules, shown)
        TensorFile.save(path, information, {"settings": key})

    return cached(cache_path(key, modules), TensorFile, write)
