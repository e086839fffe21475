"""Tables and plots of a diagnosis: who disturbs whom, how much, and in which layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from torch import Tensor

from osrm.interference import Diagnosis, others, own
from osrm.report import COLOURS, markdown, save


def tables(diagnosis: Diagnosis) -> str:
    """Markdown tables of the shifts, of each task and of each merge, and how to read them."""
    tasks = diagnosis.shifts.tasks
    parts = [_shift_table(diagnosis), _task_table(diagnosis)]
    if diagnosis.errors:
        head = ["merged by", *tasks, "average"]
        rows = [
            [method, *_cells([*error.overall, error.overall.nanmean()], 100)]
            for method, error in diagnosis.errors.items()
        ]
        parts.append(
            f"{_markdown(head, rows)}\n\n"
            "Error × 100 of the merged update M on each task's own data:"
            " ‖(M - ΔW) Xᵀ‖ / ‖W0 Xᵀ‖ over all layers. 0: the task's own adapter exactly; as large"
            " as its own shift: no better than no update.\n"
        )
    return "\n".join(parts)


def _shift_table(diagnosis: Diagnosis) -> str:
    shifts = diagnosis.shifts
    head = ["adapter \\ data", *shifts.tasks]
    rows = [[task, *_cells(row, 100)] for task, row in zip(shifts.tasks, shifts.overall)]
    ratio = shifts.cross_over_own
    return (
        f"{_markdown(head, rows)}\n\n"
        "How far the adapter (row) shifts what the layers put out on data of a task (column),"
        " × 100: ‖ΔW Xᵀ‖ / ‖W0 Xᵀ‖ over all layers. The diagonal is wanted, the rest is"
        f" interference. Shift of other tasks / own shift, mean of the adapters:"
        f" {_cell(math.nan if ratio is None else ratio)}.\n"
    )


def _task_table(diagnosis: Diagnosis) -> str:
    energy, shift = diagnosis.energy.overall, diagnosis.shifts.overall
    columns = {
        "energy, own": _cells(own(energy)),
        "energy, others": _cells(others(energy).nanmean(-1)),
        "shift, own": _cells(own(shift), 100),
        "shift, others": _cells(others(shift).nanmean(-1), 100),
        "drift of A": _cells(diagnosis.drift.overall),
        "A in start": _cells(diagnosis.kept.overall),
        "norm": _cells(diagnosis.norm.overall),
        "A overlap": _cells(others(diagnosis.overlap.overall).nanquantile(0.5, -1)),
        "sign conflict": _cells(others(diagnosis.conflict.overall).nanquantile(0.5, -1)),
    }
    rows = [[task, *cells] for task, *cells in zip(diagnosis.shifts.tasks, *columns.values())]
    return (
        f"{_markdown(['adapter', *columns], rows)}\n\n"
        "Energy: of the inputs along A before training; 1 is that of random directions. Shift: as"
        " above. Drift of A: ‖change‖ / ‖start‖. A in start: share of the trained A's squared norm"
        " inside the row space of its start. Norm: ‖ΔW‖ over all layers. A overlap: cosine of the"
        " angles between the row spaces of two tasks' trained A; 0 is orthogonal. Sign conflict:"
        " share of entries of opposite signs in two tasks' ΔW. Others: the mean over the other"
        " tasks; of overlap and conflict the median.\n"
    )


def heat_map(diagnosis: Diagnosis, path: Path) -> None:
    """The overall relative shifts × 100 as coloured squares: rows adapters, columns data."""
    tasks, shift = diagnosis.shifts.tasks, 100 * diagnosis.shifts.overall
    side = 2 + 0.6 * len(tasks)
    figure, axes = plt.subplots(figsize=(side + 0.8, side), layout="constrained")
    image = axes.imshow(shift.numpy(), cmap="Blues", vmin=0)
    for i, row in enumerate(shift):
        for j, value in enumerate(row):
            colour = "white" if value > 0.6 * shift.max() else "black"
            axes.text(j, i, _cell(float(value)), ha="center", va="center", fontsize=8, color=colour)
    axes.set_xticks(range(len(tasks)), tasks, rotation=45, fontsize=8)
    axes.set_yticks(range(len(tasks)), tasks, fontsize=8)
    axes.set_xlabel("data of")
    axes.set_ylabel("adapter of")
    figure.colorbar(image, label="relative shift (× 100)")
    save(figure, path)


def layer_plot(diagnosis: Diagnosis, path: Path) -> None:
    """Own and other tasks' relative shift against the layer, a colour for each projection.

    Modules of the same last name (query, value) are one projection, its layers numbered in the
    order of the modules.
    """
    shifts = diagnosis.shifts
    projections: dict[str, list[int]] = {}
    for index, module in enumerate(shifts.modules):
        projections.setdefault(module.rpartition(".")[2], []).append(index)
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    lines = {"own": (own(shifts.relative), "-"), "others": (others(shifts.relative), "--")}
    for i, (projection, indices) in enumerate(projections.items()):
        for name, (shift, style) in lines.items():
            heights = 100 * shift[indices].flatten(1).nanmean(1)
            colour = COLOURS[i % len(COLOURS)]
            label = f"{projection}, {name}"
            axes.plot(heights.numpy(), style, marker=".", color=colour, label=label)
    axes.set_ylim(bottom=0)
    axes.locator_params(axis="x", integer=True)
    axes.set_xlabel("layer")
    axes.set_ylabel("relative shift of the outputs (× 100)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(
        title="projection, data of",
        frameon=False,
        ncols=len(projections),
        loc="outside upper right",
    )
    save(figure, path)


def _cells(values: Sequence[Tensor] | Tensor, factor: float = 1) -> list[str]:
    return [_cell(factor * float(value)) for value in values]


def _cell(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "–"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return markdown([head, ["---", *["---:"] * (len(head) - 1)], *rows])
