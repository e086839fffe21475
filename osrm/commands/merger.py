"""Merge with one method after the other, save what each gives, and search for the best knobs."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from osrm.commands.inputs import Inputs
from osrm.commands.statistics import collect_statistics
from osrm.config import MergeConfig
from osrm.lending import applied
from osrm.measure import peak_memory, reset_peak_memory
from osrm.merged import MergedUpdate, save_merged
from osrm.merging import METHODS, merge
from osrm.merging.regmean import condition
from osrm.records import Merge, Recipe, Search
from osrm.session import Session
from osrm.task_vectors import Lazy

logger = logging.getLogger(__name__)

MOST = 6
"""The λ that a search tries beyond its grid."""


@dataclass(frozen=True)
class Merger:
    """The inputs and methods of one command, and where its merges go."""

    inputs: Inputs
    session: Session | None
    """None with --no-eval: then no method looks at data."""
    shared: Merge
    directory: Path
    methods: dict[str, dict[str, Any]]
    """{method: {knob: value}}; --search changes them."""
    search: dict[str, Search]
    device: torch.device
    costs: dict[str, dict[str, float]] = field(default_factory=dict)
    """{method: the costs of its last merge, as in `Row`}"""
    statistics: dict[str, Lazy[Any]] = field(default_factory=dict)
    """{what methods need beside the updates: it, as it was collected}"""

    def save(self, methods: Mapping[str, dict[str, Any]]) -> None:
        """Merge with these methods and knobs; each replaces the method's earlier merge."""
        heads = {task: checkpoint.head for task, checkpoint in self.inputs.checkpoints.items()}
        vectors, dtype = self.inputs.vectors, getattr(torch, self.shared.dtype)
        for name, knobs in methods.items():
            method, directory, statistics = METHODS[name], self.directory / name, None
            if needs := method.needs:
                if needs not in self.statistics:
                    assert self.session is not None
                    self.statistics[needs] = collect_statistics(
                        needs, self.session, self.inputs, self.shared
                    )
                statistics = self.statistics[needs]
            recipe = Recipe(
                **vars(self.shared),
                method=name,
                paper=method.paper,
                knobs=knobs,
                search=self.search.get(name),
            )
            reset_peak_memory()
            begin = time.perf_counter()
            merged = merge(name, vectors, statistics, dtype, device=self.device, **knobs)
            save_merged(directory, merged, heads, recipe)
            seconds, peak = time.perf_counter() - begin, peak_memory(self.device.type)
            size = sum(path.stat().st_size for path in (directory / "updates").iterdir()) / 2**20
            self.costs[name] = {"merge_seconds": seconds, "merge_peak_gib": peak, "size_mib": size}
            if statistics is not None and method.needs == "moments":
                equations = {knob: value for knob, value in knobs.items() if knob != "scale"}
                conditions = [condition(statistics[module], **equations) for module in vectors]
                self.costs[name]["condition"] = max(conditions)
            logger.info(
                "%s: %d tasks merged in %.1f s, peak memory %.2f GiB, update of %.1f MiB",
                *(name, len(heads), seconds, peak, size),
            )

    def choose(self, config: MergeConfig) -> None:
        """--search: find the best λ, and density, of each method that has them; merge with them.

        Best is the average score on held-out data. The grid goes on beyond an edge that is best.
        Each density is merged once, with λ = 1: updates are linear in λ. All methods are merged
        already.
        """
        grid = sorted(set(config.search))
        densities: list[float] | list[None] = sorted(set(config.search_density)) or [None]
        best: dict[str, Search] = {}
        better = self.shared.measure.best
        for density in densities:
            tried: dict[str, dict[str, Any]] = {}
            for name in self.methods:
                takes = METHODS[name].knobs
                if "scale" in takes and density is not None and "density" in takes:
                    tried[name] = {"density": density}
                elif "scale" in takes and name not in best:
                    tried[name] = {}
            self.save({n: {**self.methods[n], **more} for n, more in tried.items() if more})
            for name, search in self.search_scales(grid, tried).items():
                # Of equal ones the first.
                best[name] = better(best.get(name, search), search, key=lambda one: one.value)
        for name, search in best.items():
            tried_scales = f"{search.grid}"
            if len(search.grid) > len(grid):
                tried_scales += f", after an edge of {grid} was the best"
            logger.info("%s: λ = %g is the best of %s", name, search.best, tried_scales)
            if search.beyond() is not None:
                logger.warning("%s: the best λ may be beyond %g; search there", name, search.best)
            self.search[name] = search
            self.methods[name] = {**self.methods[name], **search.knobs, "scale": search.best}
        self.save({name: self.methods[name] for name in best})

    def search_scales(
        self, grid: list[float], tried: Mapping[str, dict[str, Any]]
    ) -> dict[str, Search]:
        """{method: its search over λ}, of merges that are saved with the knobs of `tried`."""
        assert self.session is not None
        runs = self.inputs.checkpoints
        curves: dict[str, dict[str, dict[float, float]]] = {
            name: {task: {} for task in runs} for name in tried
        }
        searches: dict[str, Search] = {}
        wanted = dict.fromkeys(tried, grid)
        while wanted:
            for task, run in runs.items():
                by_method = held_out_scores(
                    self.session, task, run.head, merged=self.directory, wanted=wanted
                )
                for name, scores_by_scale in by_method.items():
                    curves[name][task] |= scores_by_scale
            searches |= {
                name: Search.choose(curves[name], tried[name], self.shared.measure)
                for name in wanted
            }
            wanted = {
                name: [beyond]
                for name in wanted
                if (beyond := searches[name].beyond()) is not None
                and len(searches[name].grid) < len(grid) + MOST
            }
        return searches


def held_out_scores(
    session: Session,
    task_name: str,
    head: Mapping[str, Tensor],
    *,
    merged: Path,
    wanted: Mapping[str, list[float]],
) -> dict[str, dict[float, float]]:
    """{method: {λ: one task's score}} for the λ in `wanted`; one model gets all the updates."""
    task = session.tasks[task_name]
    model = session.model(task, head)
    examples = {"": session.encoded(task, session.data[task_name].selection)}
    by_method: dict[str, dict[float, float]] = {method: {} for method in wanted}
    memory: dict[str, Tensor] = {}
    for method, scales in wanted.items():
        for scale in scales:
            update = MergedUpdate(merged / method, task_name, scale, session.device)
            with applied(model, update, memory):
                title = f"{task_name}: {method}, λ = {scale:g}"
                metrics = session.scores(task, session.predict(model, task, examples, title))
            by_method[method][scale] = metrics[f"eval_{task.score}"]
    return by_method
