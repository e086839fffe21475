"""The latent features of a task: second moments of the inputs of every adapted layer."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from osrm.config import derive_seed
from osrm.covariance import Covariance
from osrm.embedded import cache_dir
from osrm.subspace import minor_subspace

logger = logging.getLogger(__name__)


def pool(
    inputs: Float[Tensor, "batch length d"], mask: Bool[Tensor, "batch length"], features: str
) -> Float[Tensor, "rows d"]:
    """The vectors that count: every unmasked token ("token"), or one mean an example."""
    if features == "token":
        return inputs[mask]
    weights = mask.to(torch.float32).unsqueeze(-1)
    return (inputs.float() * weights).sum(1) / weights.sum(1)


@contextmanager
def recorded_inputs(
    model: nn.Module, modules: Sequence[str]
) -> Iterator[tuple[dict[str, Tensor], dict[str, str]]]:
    """Lend `model` hooks that note what enters the modules in each forward pass.

    Yields (inputs, leaders): `inputs` has each distinct tensor once, under the first module
    that read it, and is for the caller to clear; `leaders` names that module for each of
    `modules`. The query, key and value of one layer read one tensor and share one statistic.
    """
    inputs: dict[str, Tensor] = {}
    leaders: dict[str, str] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def record(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            same = (leader for leader, tensor in inputs.items() if tensor is args[0])
            leaders[name] = next(same, name)
            inputs[leaders[name]] = args[0]

        return record

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in modules]
    try:
        yield inputs, leaders
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def collect(
    model: Any,
    modules: Sequence[str],
    batches: Iterable[Mapping[str, Tensor]],
    features: str,
    count_padding: bool = False,
) -> tuple[dict[str, Covariance], dict[str, str]]:
    """The statistic of every distinct input of `modules`, in one pass over the batches.

    Args:
        features: "token", "sample" (one mean an example), or "mean" (their mean: one vector).
        count_padding: padding counts like text; the batches must then be padded alike.

    Returns:
        ({leader: statistic}, {module: leader}), as in `recorded_inputs`.
    """
    totals: dict[str, Covariance] = {}
    training = model.training
    model.eval()
    try:
        with recorded_inputs(model, modules) as (inputs, leaders):
            for batch in batches:
                batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
                mask = batch["attention_mask"].bool() | count_padding
                model(**batch)
                for name, tensor in inputs.items():
                    statistic = Covariance.of(pool(tensor, mask, features))
                    totals[name] = totals[name] + statistic if name in totals else statistic
                inputs.clear()
    finally:
        model.train(training)
    if features == "mean":
        totals = {name: Covariance.of(total.mean[None]) for name, total in totals.items()}
    return totals, leaders


class FeatureFile(Mapping[str, Covariance]):
    """A task's statistics on disk; a look-up by module name reads that module's alone."""

    def __init__(self, path: Path) -> None:
        """Open the file; raises SafetensorError, KeyError or OSError if it is no such file."""
        self.path = path
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["header"])
            self.leaders: dict[str, str] = header["leaders"]
            self.counts: dict[str, int] = header["counts"]
            if _checksum(file.keys(), file.get_tensor) != header["sha256"]:
                raise SafetensorError("checksum differs")

    @staticmethod
    def save(path: Path, totals: Mapping[str, Covariance], leaders: Mapping[str, str]) -> None:
        """Write the statistics; the file appears under its name only when it is whole."""
        tensors = {}
        for name, total in totals.items():
            tensors[f"{name}/mean"] = total.mean.cpu().contiguous()
            tensors[f"{name}/scatter"] = total.scatter.cpu().contiguous()
        header = {
            "leaders": dict(leaders),
            "counts": {name: total.count for name, total in totals.items()},
            "sha256": _checksum(tensors, tensors.__getitem__),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        # One entry: safetensors writes several in no fixed order.
        save_file(tensors, temporary, {"header": json.dumps(header)})
        temporary.replace(path)

    def __getitem__(self, module: str) -> Covariance:
        name = self.leaders[module]
        with safe_open(self.path, framework="pt") as file:
            mean, scatter = file.get_tensor(f"{name}/mean"), file.get_tensor(f"{name}/scatter")
        return Covariance(self.counts[name], mean, scatter)

    def __iter__(self) -> Iterator[str]:
        return iter(self.leaders)

    def __len__(self) -> int:
        return len(self.leaders)


def _checksum(names: Iterable[str], tensor: Callable[[str], Tensor]) -> str:
    """sha256 of the tensors in the order of their names, one in memory at a time."""
    digest = hashlib.sha256()
    for name in sorted(names):
        digest.update(tensor(name).numpy().tobytes())
    return digest.hexdigest()


def task_features(
    settings: Mapping[str, Any],
    model: Any,
    modules: Sequence[str],
    batches: Iterable[Mapping[str, Tensor]],
) -> FeatureFile:
    """The statistics of one task's examples, computed once for all runs that share `settings`.

    Args:
        settings: all that the statistics depend on beside the modules: a fingerprint of the
            backbone and of the data, ...; "task", "features" and "count_padding" among them.
    """
    text = json.dumps({**settings, "modules": list(modules)}, sort_keys=True)
    name = hashlib.sha256(text.encode()).hexdigest()[:24]
    path = cache_dir() / "features" / f"{settings['task']}-{name}.safetensors"
    if path.exists():
        try:
            return FeatureFile(path)
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            logger.warning("%s is damaged (%s); computing it again", path, error)
    shown = tqdm(batches, desc=f"features of {settings['task']}", unit="batch")
    totals, leaders = collect(
        model, modules, shown, settings["features"], settings["count_padding"]
    )
    FeatureFile.save(path, totals, leaders)
    return FeatureFile(path)


def analytical_start(
    task: str, features: Mapping[str, FeatureFile], rank: int, seed: int
) -> dict[str, Float[Tensor, "rank in"]]:
    """OSRM: for every module the A of least energy of the features of the other tasks.

    Args:
        features: {task: statistics}; that of `task` itself is not looked at.
    """
    others = [file for name, file in features.items() if name != task]
    solved: dict[str, Tensor] = {}
    start = {}
    for module, leader in others[0].leaders.items():
        if leader not in solved:
            moment = reduce(add, (file[module] for file in others)).moment
            generator = torch.Generator().manual_seed(derive_seed(seed, task, "A", leader))
            solved[leader] = minor_subspace(moment, rank, generator)
        start[module] = solved[leader].to(torch.float32)
    return start
