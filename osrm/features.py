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

from osrm.config import EPSILON, derive_seed
from osrm.embedded import cache_dir
from osrm.errors import UserError, first_line
from osrm.moments import Moment, without
from osrm.starts import Problem, draw

logger = logging.getLogger(__name__)


# Files whose settings differ in one of these count other vectors: they cannot be added.
COMPARABLE = ("body_fingerprint", "features", "count_padding")


def pool(
    inputs: Float[Tensor, "batch *positions d"],
    mask: Bool[Tensor, "batch length"] | None,
    features: str,
) -> Float[Tensor, "rows d"]:
    """The vectors that count: every unmasked position ("token"), or one mean an example."""
    inputs = inputs.reshape(len(inputs), -1, inputs.shape[-1])
    if mask is None:
        mask = inputs.new_ones(inputs.shape[:2], dtype=torch.bool)
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
    batches: Iterable[Any],
    features: str,
    count_padding: bool = False,
) -> tuple[dict[str, Moment], dict[str, str]]:
    """The statistic of every distinct input of `modules`, in one pass over the batches.

    Args:
        batches: keyword arguments of the model, or its one argument.
        features: "token", "sample" (one mean an example), or "mean" (their mean: one vector).
        count_padding: padding counts like text; the batches must then be padded alike.

    Returns:
        ({leader: statistic}, {module: leader}), as in `recorded_inputs`.

    Raises:
        ValueError: a module never ran.
    """
    totals: dict[str, Any] = {}
    training = model.training
    device = next(model.parameters()).device
    model.eval()
    try:
        with recorded_inputs(model, modules) as (inputs, leaders):
            for batch in batches:
                if isinstance(batch, Mapping):
                    batch = {name: value.to(device) for name, value in batch.items()}
                    model(**batch)
                else:
                    model(batch.to(device))
                for name, tensor in inputs.items():
                    mask = None if count_padding else token_mask(batch, tensor)
                    rows = pool(tensor, mask, features)
                    statistic = (
                        torch.cat([rows.double(), torch.ones_like(rows[:, :1])], 1).sum(0)
                        if features == "mean"
                        else Moment.of(rows)
                    )
                    totals[name] = totals[name] + statistic if name in totals else statistic
                inputs.clear()
    finally:
        model.train(training)
    idle = [name for name in modules if name not in leaders]
    if idle:
        raise ValueError(f"{len(idle)} layers never ran ({', '.join(idle[:3])})")
    if features == "mean":  # the last number is the count of samples
        totals = {name: Moment.of(total[None, :-1] / total[-1]) for name, total in totals.items()}
    return totals, leaders


def token_mask(batch: Any, inputs: Tensor) -> Tensor | None:
    """Which positions of a layer's inputs are real: the attention mask that has their shape.

    A decoder's own mask comes second; images, and layers that see other positions, have none.
    """
    masks = (
        batch.get(name) if isinstance(batch, Mapping) else None
        for name in ("attention_mask", "decoder_attention_mask")
    )
    fits = (mask for mask in masks if mask is not None and mask.shape == inputs.shape[:-1])
    mask = next(fits, None)
    return None if mask is None else mask.bool()


class FeatureFile(Mapping[str, Moment]):
    """A task's statistics on disk; a look-up by module name reads that module's alone.

    One safetensors file: a tensor for each distinct input (see `Moment.data`), and a header in
    JSON: "settings" (what the statistics depend on), "leaders" {module: tensor}, "counts"
    {tensor: vectors}, and "sha256" of the tensors. It holds no text of the task.
    """

    def __init__(self, path: Path) -> None:
        """Open the file and read it through; raises ValueError if it is damaged, or none."""
        self.path = path
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {})["header"])
                self.settings: dict[str, Any] = dict(header["settings"])
                self.leaders: dict[str, str] = dict(header["leaders"])
                self.counts: dict[str, int] = dict(header["counts"])
                self.sha256: str = header["sha256"]
                if _checksum(file.keys(), file.get_tensor) != self.sha256:
                    raise ValueError("its checksum differs")
                for name in self.leaders.values():
                    _check_moment(self.counts[name], file.get_tensor(name))
        except (SafetensorError, OSError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"no file of feature statistics: {first_line(error)}") from None

    @staticmethod
    def save(
        path: Path,
        settings: Mapping[str, Any],
        totals: Mapping[str, Moment],
        leaders: Mapping[str, str],
    ) -> None:
        """Write the statistics; the file appears under its name only when it is whole."""
        tensors = {name: total.data.cpu().contiguous() for name, total in totals.items()}
        header = {
            "settings": dict(settings),
            "leaders": dict(leaders),
            "counts": {name: total.count for name, total in totals.items()},
            "sha256": _checksum(tensors, tensors.__getitem__),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        # One entry: safetensors writes several in no fixed order.
        save_file(tensors, temporary, {"header": json.dumps(header)})
        temporary.replace(path)

    def __getitem__(self, module: str) -> Moment:
        name = self.leaders[module]
        with safe_open(self.path, framework="pt") as file:
            return Moment(self.counts[name], file.get_tensor(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self.leaders)

    def __len__(self) -> int:
        return len(self.leaders)


def _check_moment(count: int, data: Tensor) -> None:
    """Refuse what `Moment` would not hold."""
    n, d = data.shape if data.ndim == 2 else (0, 0)
    rows = n == count < d and data.dtype == torch.float32
    if not (rows or (n == d > 0 and count > 0 and data.dtype == torch.float64)):
        raise ValueError(f"{tuple(data.shape)} {data.dtype} is no statistic of {count} vectors")
    if not data.isfinite().all():
        raise ValueError("it holds NaN or infinity")


def _checksum(names: Iterable[str], tensor: Callable[[str], Tensor]) -> str:
    """sha256 of the tensors in the order of their names, one in memory at a time."""
    digest = hashlib.sha256()
    for name in sorted(names):
        digest.update(name.encode())
        digest.update(tensor(name).numpy().tobytes())
    return digest.hexdigest()


def task_features(
    settings: Mapping[str, Any],
    model: Any,
    modules: Sequence[str],
    batches: Iterable[Any],
    path: Path | None = None,
) -> FeatureFile:
    """The statistics of one task's examples, computed once for all runs that share `settings`.

    Args:
        settings: all that the statistics depend on beside the modules: a fingerprint of the
            backbone and of the data, ...; "task", "features" and "count_padding" among them.
        path: where they go, by default into the cache; a file there is not looked at.
    """
    if path is None:
        text = json.dumps({**settings, "modules": list(modules)}, sort_keys=True)
        name = hashlib.sha256(text.encode()).hexdigest()[:24]
        path = cache_dir() / "features" / f"{settings['task']}-{name}.safetensors"
        if path.exists():
            try:
                return FeatureFile(path)
            except ValueError as error:
                logger.warning("%s is damaged (%s); computing it again", path, error)
    shown = tqdm(batches, desc=f"features of {settings['task']}", unit="batch")
    try:
        totals, leaders = collect(
            model, modules, shown, settings["features"], settings["count_padding"]
        )
    except ValueError as error:
        raise UserError(f"features of '{settings['task']}': {error}") from None
    FeatureFile.save(path, settings, totals, leaders)
    return FeatureFile(path)


def read_bank(directory: Path) -> dict[str, FeatureFile]:
    """{task: statistics} of a folder of <task>.safetensors files; it need not exist yet.

    Raises:
        UserError: a file that is damaged, or no such file.
    """
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        try:
            found[path.stem] = FeatureFile(path)
        except ValueError as error:
            raise UserError(f"{path}: {error}; get it again, or delete it") from None
    return found


def check_comparable(
    file: FeatureFile, settings: Mapping[str, Any], modules: Sequence[str]
) -> None:
    """Refuse statistics of another backbone, other layers or another pooling.

    Raises:
        UserError: one line with the file and every field that differs.
    """
    problems = [
        f"{name} is {file.settings.get(name)!r} there, {settings[name]!r} here"
        for name in COMPARABLE
        if file.settings.get(name) != settings[name]
    ]
    lacking = [name for name in modules if name not in file]
    if lacking:
        problems.append(f"it lacks {len(lacking)} layers ({lacking[0]}, ...)")
    if problems:
        raise UserError(
            f"{file.path}: {'; '.join(problems)}; statistics of one bank must agree: compute it"
            " again with these settings"
        )


def starts(
    init: str,
    tasks: Sequence[str],
    widths: Mapping[str, int],
    rank: int,
    seed: int,
    features: Mapping[str, Mapping[str, Moment]],
    leaders: Mapping[str, str],
    others: Sequence[str],
    epsilon: float = EPSILON,
    norm: float | None = None,
) -> dict[str, dict[str, Float[Tensor, "rank in"]]]:
    """The A of every module, for each of the tasks, from the start `init`.

    One layer's statistics are in memory at a time. Modules that read one input share one A if
    the start looks at features; the others have their own, as in PEFT.

    Args:
        widths: {module: its input features}.
        features: {task: {module: statistic}} of `tasks` and `others`; empty if not needed.
        leaders: {module: the first module that reads the same input}, as in `recorded_inputs`.
        others: the tasks to avoid; a task never avoids itself.
    """
    found: dict[str, dict[str, Tensor]] = {task: {} for task in tasks}
    groups: dict[str, list[str]] = {}
    for module in widths:
        groups.setdefault(leaders[module] if features else module, []).append(module)
    for leader, members in groups.items():
        moments = {task: file[leader] for task, file in features.items()}
        avoided = {task: moments[task] for task in others if task in moments}
        total = reduce(add, avoided.values()) if avoided else None
        for task in tasks:
            own_others = without(total, avoided, task) if total else None
            problem = Problem(widths[leader], rank, moments.get(task), own_others, epsilon)
            generator = torch.Generator().manual_seed(derive_seed(seed, task, "A", leader))
            A = draw(init, problem, generator, norm)
            found[task].update(dict.fromkeys(members, A))
    return found
