"""How far adapters disturb each other, measured on layer inputs before and after merging.

The update of task 2 shifts the outputs of task 1 by B2 A2 h1 (OSRM, Sec. 3). This shift is measured
for every pair of tasks and every layer, from second moments alone. Tables have a row for each
adapter i and a column for each task's data j. NaN: not defined, e.g. drift from an unknown start.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from osrm.errors import UserError
from osrm.moments import Moment
from osrm.task_vectors import LoraPair, Update, dense, on


def squared_shift(update: Update, moment: Moment) -> float:
    """E‖ΔW x‖² = tr(ΔW S ΔWᵀ), S = E[x xᵀ]; a pair's ΔW is never formed."""
    if not isinstance(update, LoraPair):
        return moment.energy(dense(update))
    A, B = update.A.double(), update.B.double()
    return update.scaling**2 * float(((B @ (A @ moment.times(A.T))) * B).sum())


def relative_energy(A: Float[Tensor, "rank in"], moment: Moment) -> float:
    """tr(A S Aᵀ) / (‖A‖_F² tr(S)/d): 1 if A has as much energy as random directions."""
    random = float(A.double().square().sum()) * moment.mean_energy
    return moment.energy(A) / random if random else math.nan


def squared_norm(update: Update) -> float:
    """‖ΔW‖_F²; a pair's ΔW is never formed."""
    if not isinstance(update, LoraPair):
        return float(dense(update).double().square().sum())
    A, B = update.A.double(), update.B.double()
    return update.scaling**2 * float(((A @ A.T) * (B.T @ B)).sum())


def row_space(A: Float[Tensor, "rank in"]) -> Float[Tensor, "dimension in"]:
    """An orthonormal basis in float64, as many rows as A's numerical rank."""
    _, values, axes = torch.linalg.svd(A.double(), full_matrices=False)
    # Adapters are stored in float32 at best: smaller values are rounding.
    return axes[values > max(A.shape) * torch.finfo(torch.float32).eps * values[:1]]


def overlap(first: Float[Tensor, "p in"], second: Float[Tensor, "q in"]) -> float:
    """Median cosine of the principal angles between the spaces of two orthonormal bases."""
    if not (len(first) and len(second)):
        return math.nan
    return float(torch.linalg.svdvals(first @ second.T).clamp_max(1).quantile(0.5))


def drift(before: Float[Tensor, "p in"], after: Float[Tensor, "q in"]) -> tuple[float, ...]:
    """How A changed in training: four squared norms, which add up over layers.

    Of the change, of A before, of A after inside the row space of A before, and of A after. All
    are zero if one of the two has no rows, that is, is unknown.
    """
    if not (len(before) and len(after)):
        return (0.0,) * 4
    before, after = before.double(), after.double()
    factors = (after - before, before, after @ row_space(before).T, after)
    return tuple(float(A.square().sum()) for A in factors)


def sign_conflict(deltas: Sequence[Float[Tensor, "out in"]]) -> tuple[Tensor, Tensor]:
    """(task, task) counts: entries of opposite signs, and entries that neither leaves at zero."""
    signs = torch.stack([delta.sign().to(torch.int8) for delta in deltas])
    products = [sign * signs for sign in signs]
    opposed = torch.stack([(product < 0).sum((1, 2)) for product in products])
    return opposed, torch.stack([(product != 0).sum((1, 2)) for product in products])


def off_diagonal(table: Float[Tensor, "*module task task"]) -> Float[Tensor, "*module task task"]:
    """The table with NaN on its diagonal: each adapter on the data of the other tasks."""
    return table.masked_fill(torch.eye(table.shape[-1], dtype=torch.bool), math.nan)


@dataclass(frozen=True, eq=False)
class Layered:
    """One quantity: a table for each module, and one for all modules together."""

    modules: Float[Tensor, "module *table"]
    overall: Float[Tensor, "*table"]

    @classmethod
    def share(cls, part: Float[Tensor, "module *table"], whole: Tensor) -> Layered:
        """part / whole; overall the quotient of their sums."""
        return cls(part / whole, part.sum(0) / whole.sum(0))

    def root(self) -> Layered:
        """Norms instead of squared norms; a difference of moments may be a little below zero."""
        return Layered(self.modules.clamp_min(0).sqrt(), self.overall.clamp_min(0).sqrt())


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """All that `diagnose` measures."""

    tasks: tuple[str, ...]
    modules: tuple[str, ...]
    shift: Layered
    """(adapter, data): ‖ΔW_i X_jᵀ‖_F / ‖W0 X_jᵀ‖_F; interference, except on the diagonal."""
    cross_over_own: float | None
    """Mean over the adapters of other tasks' shift / own shift; None if no own shift is above 0."""
    energy_before: Layered
    """(adapter, data): `relative_energy` of A before training; overall the mean of the modules."""
    overlap: Layered
    """(task, task): `overlap` of the row spaces of the trained A; overall the modules' median."""
    sign_conflict: Layered
    """(task, task): share of entries with opposite signs among those non-zero in both updates."""
    drift: Layered
    """(task): ‖A_after - A_before‖_F / ‖A_before‖_F."""
    kept_in_start: Layered
    """(task): share of the trained A's squared norm inside the row space of A before training."""
    norm: Layered
    """(task): ‖ΔW‖_F."""
    merge_error: dict[str, Layered]
    """Merging method -> (task): ‖(M_j - ΔW_j) X_jᵀ‖_F / ‖W0 X_jᵀ‖_F, M_j what task j receives."""

    def record(self) -> dict[str, Any]:
        """As JSON: tables in the order of "tasks", rows adapters; None for NaN."""
        return {name: _plain(value, self.modules) for name, value in vars(self).items()}


@torch.no_grad()
def diagnose(
    updates: Mapping[str, Mapping[str, Update]],
    moments: Mapping[str, Mapping[str, Moment]],
    weights: Callable[[str], Tensor],
    *,
    starts: Mapping[str, Mapping[str, Tensor]] | None = None,
    merged: Mapping[str, Mapping[str, Mapping[str, Tensor]]] | None = None,
) -> Diagnosis:
    """Measure all tasks' adapters against all tasks' data; UserError if none updates a module.

    The tensors of one module are in memory at a time, on the device of its weight, where its
    moments are, too. If a task lacks a module, its update is zero.

    Args:
        updates: {task: {module: update}}.
        moments: {task: {module: moment of the module's inputs on the task's data}}.
        weights: module -> the frozen weight W0 (out, in).
        starts: {task: {module: A before training}}, as far as known.
        merged: {method: {task: {module: the dense update that the task receives}}}.
    """
    tasks = tuple(updates)
    modules = tuple(dict.fromkeys(name for task in tasks for name in updates[task]))
    if not modules:
        raise UserError("nothing to diagnose: no task updates a module")
    starts, merged = starts or {}, merged or {}

    def measure(module: str) -> dict[str, Tensor]:
        """One module's numbers in float64."""
        weight = weights(module)
        device, (out, d) = weight.device, weight.shape
        # If a task lacks the module, its pair or its A has rank zero: no shift, an energy of 0/0.
        nothing = LoraPair(weight.new_zeros(0, d), weight.new_zeros(out, 0), 0.0)
        pairs = [on(device, updates[task].get(module, nothing)) for task in tasks]
        before = [starts.get(task, {}).get(module, nothing.A).to(device) for task in tasks]
        after = [pair.A if isinstance(pair, LoraPair) else nothing.A for pair in pairs]
        inputs = [moments[task][module] for task in tasks]
        deltas = [dense(pair) for pair in pairs]
        rows = list(zip(tasks, inputs, deltas))
        opposed, shared = sign_conflict(deltas)
        frames = [row_space(A) for A in after]
        numbers: dict[str, Any] = {
            "shift": [[squared_shift(pair, moment) for moment in inputs] for pair in pairs],
            "outputs": [moment.energy(weight) for moment in inputs],
            "energy": [[relative_energy(A, moment) for moment in inputs] for A in before],
            "overlap": [[overlap(first, second) for second in frames] for first in frames],
            "opposed": opposed,
            "shared": shared,
            "drift": [drift(old, new) for old, new in zip(before, after)],
            "norm": [squared_norm(pair) for pair in pairs],
            "errors": [
                [
                    moment.energy(update[task][module].to(device) - delta)
                    for task, moment, delta in rows
                ]
                for update in merged.values()
            ],
        }
        on_host = partial(torch.as_tensor, dtype=torch.float64, device="cpu")
        return {name: on_host(number) for name, number in numbers.items()}

    measured = [measure(name) for name in modules]
    sums = {name: torch.stack([numbers[name] for numbers in measured]) for name in measured[0]}
    norm, outputs = sums["norm"], sums["outputs"]
    moved, start, inside, end = sums["drift"].unbind(-1)
    shift = Layered.share(sums["shift"], outputs[:, None]).root()
    own, others = shift.overall.diagonal(), off_diagonal(shift.overall).nanmean(-1)
    ratio = float((others / own)[own > 0].nanmean())
    return Diagnosis(
        tasks,
        modules,
        shift,
        cross_over_own=None if math.isnan(ratio) else ratio,
        energy_before=Layered(sums["energy"], sums["energy"].nanmean(0)),
        overlap=Layered(sums["overlap"], sums["overlap"].nanquantile(0.5, 0)),
        sign_conflict=Layered.share(sums["opposed"], sums["shared"]),
        drift=Layered.share(moved, start).root(),
        kept_in_start=Layered.share(inside, end),
        norm=Layered(norm, norm.sum(0)).root(),
        merge_error={
            method: Layered.share(error, outputs).root()
            for method, error in zip(merged, sums["errors"].unbind(1))
        },
    )


def _plain(value: Any, modules: Sequence[str]) -> Any:
    if isinstance(value, Layered):
        tables = dict(zip(modules, value.modules.tolist()))
        value = {"overall": value.overall.tolist(), "modules": tables}
    if isinstance(value, dict):
        return {name: _plain(entry, modules) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry, modules) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
