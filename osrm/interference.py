"""How far do adapters disturb each other? Measured on layer inputs, before and after merging.

The update of task 2 shifts the outputs of task 1 by B2 A2 h1 (OSRM, Sec. 3). Here that shift is
measured for every pair of tasks and every layer, from second moments alone: no input is needed
again. Tables have a row for each adapter i and a column for each task's data j. NaN stands for
what is not defined, such as the drift of an adapter whose start is unknown.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from osrm.errors import UserError
from osrm.moments import Moment
from osrm.task_vectors import LoraPair, Update, dense

# Adapters are stored in float32 at best: relative to the largest, smaller singular values are
# rounding.
_EPSILON = torch.finfo(torch.float32).eps


def squared_shift(update: Update, moment: Moment) -> float:
    """E‖ΔW x‖² = tr(ΔW S ΔWᵀ), S = E[x xᵀ]; a pair's ΔW is never formed."""
    if not isinstance(update, LoraPair):
        return moment.energy(dense(update))
    A, B = update.A.double(), update.B.double()
    return update.scaling**2 * float(((B @ (A @ moment.times(A.T))) * B).sum())


def output_shift(
    update: Update, weight: Float[Tensor, "out in"], moment: Moment
) -> tuple[float, float]:
    """(E‖ΔW x‖², E‖W0 x‖²): the squared shift of a layer's output, and the squared output.

    Both add up over layers. The root of their quotient is the relative shift
    ‖ΔW Xᵀ‖_F / ‖W0 Xᵀ‖_F over the vectors (rows of X) of the moment.
    """
    return squared_shift(update, moment), moment.energy(weight)


def relative_energy(A: Float[Tensor, "rank in"], moment: Moment) -> float:
    """tr(A S Aᵀ) / (‖A‖_F² tr(S)/d): 1 if A meets as much energy as random directions do."""
    random = float(A.double().square().sum()) * moment.mean_energy
    return moment.energy(A) / random if random else math.nan


def squared_norm(update: Update) -> float:
    """‖ΔW‖_F²; of a pair from r × r products."""
    if not isinstance(update, LoraPair):
        return float(dense(update).double().square().sum())
    A, B = update.A.double(), update.B.double()
    return update.scaling**2 * float(((A @ A.T) * (B.T @ B)).sum())


def row_space(A: Float[Tensor, "rank in"]) -> Float[Tensor, "dimension in"]:
    """An orthonormal basis in float64, as many rows as A's numerical rank."""
    _, values, axes = torch.linalg.svd(A.double(), full_matrices=False)
    return axes[values > max(A.shape) * _EPSILON * values[:1]]


def overlap(first: Float[Tensor, "p in"], second: Float[Tensor, "q in"]) -> float:
    """Median cosine of the principal angles between the spaces of two orthonormal bases."""
    if not (len(first) and len(second)):
        return math.nan
    return float(torch.linalg.svdvals(first @ second.T).clamp_max(1).quantile(0.5))


def drift(
    before: Float[Tensor, "p in"], after: Float[Tensor, "q in"]
) -> tuple[float, float, float, float]:
    """How A moved in training: four squared norms, which add up over layers.

    Of the change, of A before, of A after inside the row space of A before, and of A after. All
    are zero if one of the two has no rows, that is, is not known.
    """
    if not (len(before) and len(after)):
        return 0.0, 0.0, 0.0, 0.0
    before, after = before.double(), after.double()
    inside = after @ row_space(before).T
    moved, start, kept, end = (
        float(each.square().sum()) for each in (after - before, before, inside, after)
    )
    return moved, start, kept, end


def sign_conflict(
    updates: Sequence[Float[Tensor, "out in"]],
) -> tuple[Int[Tensor, "task task"], Int[Tensor, "task task"]]:
    """Of each two tasks: entries of opposite signs, and entries that neither leaves at zero."""
    signs = torch.stack([update.sign().to(torch.int8) for update in updates])
    products = [sign * signs for sign in signs]
    opposed = torch.stack([(product < 0).sum((1, 2)) for product in products])
    return opposed, torch.stack([(product != 0).sum((1, 2)) for product in products])


def own(table: Float[Tensor, "*module task task"]) -> Float[Tensor, "*module task"]:
    """The diagonal: each adapter on its own data."""
    return table.diagonal(dim1=-2, dim2=-1)


def others(table: Float[Tensor, "*module task task"]) -> Float[Tensor, "*module task task"]:
    """The table with NaN on its diagonal, for `nanmean` and the like over the other tasks."""
    return table.masked_fill(torch.eye(table.shape[-1], dtype=torch.bool), math.nan)


@dataclass(frozen=True, eq=False)
class Layered:
    """One quantity: a table for each module, and one for all modules together."""

    modules: Float[Tensor, "module *table"]
    overall: Float[Tensor, "*table"]

    @classmethod
    def share(
        cls, part: Float[Tensor, "module *table"], whole: Float[Tensor, "module *table"]
    ) -> Layered:
        """part / whole; overall the quotient of their sums."""
        return cls(part / whole, part.sum(0) / whole.sum(0))

    def root(self) -> Layered:
        """Norms instead of squared norms."""
        return Layered(_root(self.modules), _root(self.overall))

    def record(self, names: Sequence[str]) -> dict[str, Any]:
        """Lists of numbers, None for NaN."""
        modules = dict(zip(names, _plain(self.modules.tolist())))
        return {"overall": _plain(self.overall.tolist()), "modules": modules}


@dataclass(frozen=True, eq=False)
class Shifts:
    """What each adapter does to the outputs of all layers on each task's data."""

    tasks: tuple[str, ...]
    modules: tuple[str, ...]
    squared: Float[Tensor, "module task task"]
    """E‖ΔW_i x_j‖²"""
    outputs: Float[Tensor, "module task"]
    """E‖W0 x_j‖²"""

    @property
    def relative(self) -> Float[Tensor, "module task task"]:
        """‖ΔW_i X_jᵀ‖_F / ‖W0 X_jᵀ‖_F; the diagonal is wanted, the rest is interference."""
        return _root(self.squared / self.outputs[:, None])

    @property
    def overall(self) -> Float[Tensor, "task task"]:
        """The same with both squared norms summed over the modules."""
        return _root(self.squared.sum(0) / self.outputs.sum(0))

    @property
    def cross_over_own(self) -> float | None:
        """Mean over the adapters of mean shift of other tasks / own shift, both overall.

        Adapters that do not shift their own task have no such ratio; None if that leaves none,
        or there is one task.
        """
        ratios = (others(self.overall).nanmean(-1) / own(self.overall))[own(self.overall) > 0]
        found = float(ratios.nanmean())
        return None if math.isnan(found) else found


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """All that `diagnose` measures."""

    shifts: Shifts
    energy: Layered
    """(adapter, data): `relative_energy` of A before training; overall the mean of the modules."""
    overlap: Layered
    """(task, task): `overlap` of the row spaces of the trained A; overall the modules' median."""
    conflict: Layered
    """(task, task): share of entries with opposite signs among those non-zero in both updates."""
    drift: Layered
    """(task): ‖A_after - A_before‖_F / ‖A_before‖_F."""
    kept: Layered
    """(task): share of the trained A's squared norm inside the row space of A before training."""
    norm: Layered
    """(task): ‖ΔW‖_F."""
    errors: dict[str, Layered]
    """Merging method -> (task): ‖(M_j - ΔW_j) X_jᵀ‖_F / ‖W0 X_jᵀ‖_F, M_j what task j receives."""

    def record(self) -> dict[str, Any]:
        """As JSON: tables in the order of "tasks", rows adapters; None for what is undefined."""
        modules = self.shifts.modules
        return {
            "tasks": list(self.shifts.tasks),
            "modules": list(modules),
            "shift": Layered(self.shifts.relative, self.shifts.overall).record(modules),
            "cross_over_own": self.shifts.cross_over_own,
            "energy_before": self.energy.record(modules),
            "overlap": self.overlap.record(modules),
            "sign_conflict": self.conflict.record(modules),
            "drift": self.drift.record(modules),
            "kept_in_start": self.kept.record(modules),
            "norm": self.norm.record(modules),
            "merge_error": {name: each.record(modules) for name, each in self.errors.items()},
        }


@torch.no_grad()
def diagnose(
    updates: Mapping[str, Mapping[str, Update]],
    moments: Mapping[str, Mapping[str, Moment]],
    weights: Callable[[str], Tensor],
    starts: Mapping[str, Mapping[str, Tensor]] | None = None,
    merged: Mapping[str, Mapping[str, Mapping[str, Tensor]]] | None = None,
) -> Diagnosis:
    """Measure all tasks' adapters against all tasks' data, module by module.

    Everything is looked up once for each module, and let go of before the next one. Modules are
    in the order of `updates`; where a task lacks one, its update is zero.

    Args:
        updates: {task: {module: update}}.
        moments: {task: {module: moment of the module's inputs on the task's data}}.
        weights: module -> the frozen weight W0 (out, in).
        starts: {task: {module: A before training}}, as far as known.
        merged: {method: {task: {module: the dense update that the task receives}}}.

    Raises:
        UserError: no task updates a module.
    """
    tasks = tuple(updates)
    modules = tuple(dict.fromkeys(name for task in tasks for name in updates[task]))
    if not modules:
        raise UserError("nothing to diagnose: no task updates a module")
    measured = [
        _measure(name, updates, moments, weights(name), starts or {}, merged or {})
        for name in modules
    ]
    sums = {name: torch.stack([each[name] for each in measured]) for name in measured[0]}
    norm, outputs = sums["norm"], sums["outputs"]
    moved, start, inside, end = sums["drift"].unbind(-1)
    return Diagnosis(
        Shifts(tasks, modules, sums["shift"], outputs),
        Layered(sums["energy"], sums["energy"].nanmean(0)),
        Layered(sums["overlap"], sums["overlap"].nanquantile(0.5, 0)),
        Layered.share(sums["opposed"], sums["shared"]),
        Layered.share(moved, start).root(),
        Layered.share(inside, end),
        Layered(norm, norm.sum(0)).root(),
        {
            method: Layered.share(error, outputs).root()
            for method, error in zip(merged or {}, sums["errors"].unbind(1))
        },
    )


def _measure(
    module: str,
    updates: Mapping[str, Mapping[str, Update]],
    moments: Mapping[str, Mapping[str, Moment]],
    weight: Float[Tensor, "out in"],
    starts: Mapping[str, Mapping[str, Tensor]],
    merged: Mapping[str, Mapping[str, Mapping[str, Tensor]]],
) -> dict[str, Tensor]:
    """One module's numbers in float64; what they are called here is summed in `diagnose`."""
    out, d = weight.shape
    # What a task lacks is a pair, or an A, of rank zero: no shift, no norm, and an energy of 0/0.
    nothing = LoraPair(weight.new_zeros(0, d), weight.new_zeros(out, 0), 0.0)
    found = [updates[task].get(module, nothing) for task in updates]
    pairs = [each if isinstance(each, LoraPair) else dense(each) for each in found]
    after = [each.A if isinstance(each, LoraPair) else nothing.A for each in pairs]
    before = [starts.get(task, {}).get(module, nothing.A) for task in updates]
    here = [moments[task][module] for task in updates]

    deltas = [dense(each) for each in pairs]
    opposed, shared = sign_conflict(deltas)
    frames = [row_space(A) for A in after]
    numbers: dict[str, Any] = {
        "shift": [[squared_shift(each, moment) for moment in here] for each in pairs],
        "outputs": [moment.energy(weight) for moment in here],
        "energy": [[relative_energy(A, moment) for moment in here] for A in before],
        "overlap": [[overlap(first, second) for second in frames] for first in frames],
        "opposed": opposed,
        "shared": shared,
        "drift": [drift(old, new) for old, new in zip(before, after)],
        "norm": [squared_norm(each) for each in pairs],
        "errors": [
            [
                moment.energy(merged[method][task][module] - delta)
                for task, moment, delta in zip(updates, here, deltas)
            ]
            for method in merged
        ],
    }
    return {name: torch.as_tensor(each, dtype=torch.float64) for name, each in numbers.items()}


def _root(squares: Float[Tensor, "*table"]) -> Float[Tensor, "*table"]:
    # A moment that is a difference of two may leave less than nothing of a vanishing energy.
    return squares.clamp_min(0).sqrt()


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return value if math.isfinite(value) else None
