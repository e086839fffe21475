"""The latent features of a task: second moments of the inputs of every adapted layer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from safetensors import SafetensorError
from torch import Tensor, nn
from tqdm.auto import tqdm

from osrm import processes
from osrm.config import EPSILON, derive_seed
from osrm.embedded import cache_dir
from osrm.errors import UserError, first_line
from osrm.moments import Moment, without
from osrm.starts import Problem, draw
from osrm.tensor_file import TensorFile, cached

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


def batches_by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Which examples to pass together, at most `batch_size`, so that little of it is padding.

    The longest of a batch has at most 1.3 times the tokens of the shortest.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        last = batches[-1] if batches else []
        if not 0 < len(last) < batch_size or lengths[index] > 1.3 * lengths[last[0]]:
            batches.append([])
        batches[-1].append(index)
    return batches


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
            if inputs.setdefault(leaders[name], args[0]) is not args[0]:
                raise ValueError(f"{name} runs more than once in a forward pass: not supported")

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

    If torch.distributed has started, of the batches of all processes together: each must call
    this with its own share, and each gets the same result.

    Args:
        batches: keyword arguments of the model, or its one argument.
        features: "token", "sample" (one mean an example), or "mean" (their mean: one vector).
        count_padding: padding counts like text; the batches must then be padded alike.

    Returns:
        ({leader: statistic}, {module: leader}), as in `recorded_inputs`.

    Raises:
        ValueError: a module never ran, or more than once in a forward pass; there was no batch;
            an input is not finite.
    """
    totals: dict[str, Moment] = {}
    waiting: dict[str, list[Tensor]] = {}

    def add_waiting(name: str) -> None:
        statistic = Moment.of(torch.cat(waiting.pop(name)))
        totals[name] = totals[name] + statistic if name in totals else statistic

    training = model.training
    device = next(model.parameters()).device
    model.eval()
    try:
        with recorded_inputs(model, modules) as (inputs, leaders):
            for batch in batches:
                if isinstance(batch, Mapping):
                    batch = {
                        name: value.to(device) if isinstance(value, Tensor) else value
                        for name, value in batch.items()
                    }
                    model(**batch)
                else:
                    model(batch.to(device))
                for name, tensor in inputs.items():
                    mask = None if count_padding else token_mask(batch, tensor)
                    rows = pool(tensor, mask, features)
                    if features == "mean":  # E[(h, 1) (h, 1)ᵀ] has the mean in its last column
                        rows = torch.cat([rows, torch.ones_like(rows[:, :1])], 1)
                    waiting.setdefault(name, []).append(rows)
                    # Many rows at a time: a product of few costs little more than its addition.
                    if sum(map(len, waiting[name])) >= 2 * rows.shape[1]:
                        add_waiting(name)
                inputs.clear()
    finally:
        model.train(training)
    for name in list(waiting):
        add_waiting(name)
    totals, leaders = over_processes(totals, leaders, device)
    if not leaders:
        raise ValueError("there was no batch")
    idle = [name for name in modules if name not in leaders]
    if idle:
        raise ValueError(f"{len(idle)} layers never ran ({', '.join(idle[:3])})")
    broken = [name for name, total in totals.items() if not total.data.isfinite().all()]
    if broken:
        raise ValueError(f"NaN or infinity enters {len(broken)} layers ({', '.join(broken[:3])})")
    if features == "mean":
        totals = {name: Moment.of(_last_column(total)[:, :-1]) for name, total in totals.items()}
    return totals, leaders


def _last_column(total: Moment) -> Float[Tensor, "1 d"]:
    unit = total.data.new_zeros(total.data.shape[1], 1)
    unit[-1] = 1
    return total.times(unit).T


def over_processes(
    totals: Mapping[str, Moment], leaders: Mapping[str, str], device: torch.device
) -> tuple[dict[str, Moment], dict[str, str]]:
    """The statistics of all processes' vectors together, if torch.distributed has started.

    A process may lack some of them, or all. Few vectors are gathered, in the order of the
    processes; sums are added on `device`, which the process group must be able to reach.
    """
    if processes.count() == 1:
        return dict(totals), dict(leaders)
    sizes = {name: (total.count, total.data.shape[1]) for name, total in totals.items()}
    known = processes.gathered((dict(leaders), sizes))
    merged = {module: leader for each, _ in known for module, leader in each.items()}
    result = {}
    for name in dict.fromkeys(merged.values()):
        parts = [sizes[name] for _, sizes in known if name in sizes]
        count, d = sum(vectors for vectors, _ in parts), parts[0][1]
        own = totals.get(name) or Moment.of(torch.zeros(0, d, device=device))
        if count < d:
            data = torch.cat(processes.gathered(own.data.cpu()))
        else:
            data = own.gram
            dist.all_reduce(data)
        result[name] = Moment(count, data)
    return result, merged


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
    return None if mask is None else mask.to(inputs.device, torch.bool)


class FeatureFile(Mapping[str, Moment]):
    """A task's statistics on disk; a look-up by module name reads that module's alone.

    A `TensorFile`: a tensor for each distinct input (see `Moment.data`), and in the header
    "settings" (what the statistics depend on), "leaders" {module: tensor} and "counts"
    {tensor: vectors}. It holds no text of the task.
    """

    def __init__(self, path: Path) -> None:
        """Open the file and read it through; raises ValueError if it is damaged, or none."""
        self.path = path
        try:
            self.tensors = TensorFile(path)
            self.sha256 = self.tensors.sha256
            header = self.tensors.header
            self.settings: dict[str, Any] = dict(header["settings"])
            self.leaders: dict[str, str] = dict(header["leaders"])
            self.counts: dict[str, int] = dict(header["counts"])
            for name in self.leaders.values():
                _check_moment(self.counts[name], self.tensors[name])
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
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
        counts = {name: total.count for name, total in totals.items()}
        header = {"settings": dict(settings), "leaders": dict(leaders), "counts": counts}
        TensorFile.save(path, tensors, header)

    def __getitem__(self, module: str) -> Moment:
        name = self.leaders[module]
        return Moment(self.counts[name], self.tensors[name])

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

    def write(path: Path) -> None:
        title = f"features of {settings['task']}"
        shown = tqdm(batches, desc=title, unit="batch", disable=not processes.is_first())
        try:
            totals, leaders = collect(
                model, modules, shown, settings["features"], settings["count_padding"]
            )
        except ValueError as error:
            raise UserError(f"features of '{settings['task']}': {error}") from None
        if processes.is_first():
            FeatureFile.save(path, settings, totals, leaders)
        processes.barrier()

    if path is None:
        return cached(cache_path(settings, modules), FeatureFile, write)
    write(path)
    return FeatureFile(path)


def cache_path(settings: Mapping[str, Any], modules: Sequence[str]) -> Path:
    """Where statistics of these settings and modules are cached."""
    text = json.dumps({**settings, "modules": list(modules)}, sort_keys=True)
    name = hashlib.sha256(text.encode()).hexdigest()[:24]
    return cache_dir() / "features" / f"{settings['task']}-{name}.safetensors"


def read_bank(directory: Path) -> dict[str, FeatureFile]:
    """{task: statistics} of a folder of <task>.safetensors files; it need not exist yet.

    Raises:
        UserError: it is no folder; a file in it is damaged, or none of ours.
    """
    if directory.exists() and not directory.is_dir():
        raise UserError(f"--feature-bank {directory}: no folder; name one, there already or not")
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
            f"{file.path}: {'; '.join(problems)}; statistics of one bank must agree, also in the"
            " --dtype that the weights were loaded in: compute it again with these settings"
        )


def starts(
    init: str,
    tasks: Sequence[str],
    widths: Mapping[str, int],
    rank: int | Mapping[str, int],
    seed: int,
    features: Mapping[str, Mapping[str, Moment]],
    leaders: Mapping[str, str],
    others: Sequence[str],
    epsilon: float = EPSILON,
    norm: float | None = None,
) -> dict[str, dict[str, Float[Tensor, "rank in"]]]:
    """The A of every module, for each of the tasks, from the start `init`.

    One layer's statistics are in memory at a time. Modules of one rank that read one input share
    one A if the start looks at features; the others have their own, as in PEFT.

    Args:
        widths: {module: its input features}.
        rank: of all modules, or {module: rank}.
        features: {task: {module: statistic}} of `tasks` and `others`; empty if not needed.
        leaders: {module: the first module that reads the same input}, as in `recorded_inputs`.
        others: the tasks to avoid; a task never avoids itself.
    """
    found: dict[str, dict[str, Tensor]] = {task: {} for task in tasks}
    ranks = rank if isinstance(rank, Mapping) else dict.fromkeys(widths, rank)
    groups: dict[tuple[str, int], list[str]] = {}
    for module in widths:
        shared = leaders[module] if features else module
        groups.setdefault((shared, ranks[module]), []).append(module)
    for members in groups.values():
        # The leader itself may be no module of ours: a bank may hold more layers than we adapt.
        first = members[0]
        moments = {task: file[first] for task, file in features.items()}
        avoided = {task: moments[task] for task in others if task in moments}
        total = reduce(add, avoided.values()) if avoided else None
        for task in tasks:
            own_others = without(total, avoided, task) if total else None
            problem = Problem(widths[first], ranks[first], moments.get(task), own_others, epsilon)
            generator = torch.Generator().manual_seed(derive_seed(seed, task, "A", first))
            A = draw(init, problem, generator, norm)
            found[task].update(dict.fromkeys(members, A))
    return found
