"""Feature statistics on disk: the cache, and banks, which are exchanged instead of data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tqdm.auto import tqdm

from osrm import processes
from osrm.errors import UserError, first_line
from osrm.features import collect
from osrm.files import cache_dir
from osrm.moments import Moment
from osrm.task_vectors import Lazy
from osrm.tensor_file import TensorFile, cached

# Statistics whose settings differ in one of these are not of the same vectors: no sum of them.
COMPARABLE = ("body_fingerprint", "features", "count_padding")


class FeatureFile(Lazy[Moment]):
    """A task's statistics on disk; a look-up by module name reads only that module's.

    A `TensorFile`: a tensor for each distinct input (see `Moment.data`), and in the header
    "settings" (what the statistics depend on), "leaders" {module: tensor} and "counts"
    {tensor: vectors}. It holds no text of the task.
    """

    def __init__(self, path: Path) -> None:
        """Read and check the whole file; raises ValueError if it is damaged or no such file."""
        self.path = path
        self.device = torch.device("cpu")
        """Where a look-up puts the statistic."""
        try:
            tensors = TensorFile(path)
            self.sha256 = tensors.sha256
            self.settings: dict[str, Any] = dict(tensors.header["settings"])
            self.leaders: dict[str, str] = dict(tensors.header["leaders"])
            counts = dict(tensors.header["counts"])
            names = self.leaders

            def read(module: str) -> Moment:
                name = names[module]
                return Moment(counts[name], tensors[name]).to(self.device)

            super().__init__(names, read)
            for moment in self.values():
                _check(moment)
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


def _check(moment: Moment) -> None:
    count, data = moment.count, moment.data
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
    *,
    path: Path | None = None,
) -> FeatureFile:
    """The statistics of one task's examples, computed once for all runs that share `settings`.

    Args:
        settings: all that the statistics depend on except the modules: "task", "features",
            "count_padding", fingerprints of the backbone and of the data, ...
        path: where to write them, over any old file; by default the cache, which is read first.
    """

    def write(path: Path) -> None:
        title = f"features of '{settings['task']}'"
        shown = tqdm(batches, desc=title, unit="batch", disable=not processes.is_first())
        try:
            kinds = {name: settings[name] for name in ("features", "count_padding")}
            totals, leaders = collect(model, modules, shown, **kinds)
        except ValueError as error:
            raise UserError(f"{title}: {error}") from None
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
    """{task: statistics} of a folder of <task>.safetensors files; it need not exist yet."""
    if directory.exists() and not directory.is_dir():
        raise UserError(f"--feature-bank {directory}: no folder; name one, there already or not")
    return {path.stem: open_features(path) for path in sorted(directory.glob("*.safetensors"))}


def open_features(path: Path) -> FeatureFile:
    """The statistics that a user names; raises UserError if the file is damaged, or another."""
    try:
        return FeatureFile(path)
    except ValueError as error:
        fix = "get it again, or delete it and compute it again"
        raise UserError(f"{path}: {error}; {fix}") from None


def check_comparable(file: FeatureFile, settings: dict[str, Any], modules: Sequence[str]) -> None:
    """Refuse statistics of another backbone, other layers or another pooling, all in one line."""
    problems = [
        f"{name} is {file.settings.get(name)!r} there, {settings[name]!r} here"
        for name in COMPARABLE
        if file.settings.get(name) != settings[name]
    ]
    if lacking := [name for name in modules if name not in file]:
        problems.append(f"it lacks {len(lacking)} layers ({lacking[0]}, ...)")
    if problems:
        raise UserError(
            f"{file.path}: {'; '.join(problems)}; statistics of one bank must agree, also in the"
            " --dtype that the weights were loaded in: compute it again with these settings"
        )
