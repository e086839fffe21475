"""Tables and plots out of results.json files: python -m osrm.report A/results.json B/results.json

The tables and plots of a diagnosis (merge.py --diagnose) come after those of results.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from osrm.errors import UserError, run_script
from osrm.files import write_text, written
from osrm.interference import Diagnosis, off_diagonal
from osrm.records import LOSS, Measure, Results, Row, Search

STYLE: Any = dict.fromkeys(["axes.spines.top", "axes.spines.right"], False)
STYLE["figure.constrained_layout.use"] = True
COSTS = ("kept", "merge_seconds", "merge_peak_gib", "size_mib")
# Okabe and Ito's colours, distinct for colour-blind readers.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")


def frame(results: Results) -> pd.DataFrame:
    """A line for each row: init, row, knobs as JSON, each task's score, averages, costs.

    With a loss there are each task's perplexity and number of tokens, too.
    """
    metrics = ("perplexity", "tokens") if results.measure is LOSS else ()
    more = [(task, metric) for task in results.tasks for metric in metrics]
    return pd.DataFrame(
        {
            "init": results.init,
            "row": row.name,
            "knobs": json.dumps(row.knobs),
            **{task: row.scores[task] for task in results.tasks},
            **{name: getattr(row, name) for name in ("average", "normalised_average", *COSTS)},
            **{f"{task}_{metric}": row.metrics[task][f"eval_{metric}"] for task, metric in more},
        }
        for row in results.rows
    )


def score_table(results: Sequence[Results]) -> str:
    """The Markdown table: a row for each method and start, a column for each task."""
    tasks, measure = list(results[0].tasks), results[0].measure
    lines = pd.concat(map(frame, results), ignore_index=True)
    table = measure.factor * lines[[*tasks, "average", "normalised_average"]].astype(float)
    table = table.map(lambda value: cell(value, measure.form))
    table.columns = [*tasks, "average", "normalised"]
    table.insert(0, "start", lines["init"])
    table.insert(1, "row", [row_title(row) for result in results for row in result.rows])
    if measure is LOSS:
        for task in tasks:
            table[f"{task}, perplexity"] = lines[f"{task}_perplexity"]
        tokens = ", ".join(f"{task} {lines[f'{task}_tokens'][0]:.0f}" for task in tasks)
        legend = f"Loss in {measure.unit}, lower is better. Tokens: {tokens}."
    else:
        scored = ", ".join(f"{task} {results[0].metric(task)}" for task in tasks).replace("_", " ")
        legend = f"Scores × 100: {scored}."
    normalised = f"Normalised: mean of each task's {measure.name} divided by its own adapter's."
    return f"{markdown(table, '.1f', titles=2)}\n\n{legend} {normalised}\n"


def cost_table(results: Results) -> str:
    """The Markdown table of what each merge has cost and kept."""
    table = frame(results).dropna(subset="merge_seconds")[["row", *COSTS]]
    table.columns = ["row", "kept", "seconds", "peak memory, GiB", "size, MiB"]
    worst = max((row.condition or 0 for row in results.rows), default=0)
    solved = f" RegMean's equations have condition numbers up to {worst:.1e}." if worst else ""
    return (
        f"{markdown(table, '.2f')}\n\n"
        "Kept: ⟨merged, own⟩ / ‖own‖² of the update that a task receives and its own, mean over"
        f" the tasks. Size: of the stored update.{solved} A layer that an adapter leaves out counts"
        " as a zero update of its task.\n"
    )


def markdown(table: pd.DataFrame, form: str = ".3g", titles: int = 1) -> str:
    """A Markdown table, its columns after the first `titles` aligned to the right."""
    align = ["left"] * titles + ["right"] * (len(table.columns) - titles)
    cells = table.map(lambda value: cell(value, form))
    return cells.to_markdown(index=False, disable_numparse=True, colalign=align)


def cell(value: Any, form: str = ".3g") -> str:
    """A text as it is, a number in that form, a dash for None, NaN and infinity."""
    if isinstance(value, str):
        return value
    return f"{value:{form}}" if value is not None and math.isfinite(value) else "–"


def row_title(row: Row) -> str:
    """A method with its knobs, e.g. `ties (density 0.2, scale 1)`."""
    knobs = ", ".join(
        f"{name} {value:g}" if isinstance(value, int | float) else f"{name} {value}"
        for name, value in row.knobs.items()
    )
    return f"{row.name} ({knobs})" if knobs else row.name


def shared_title(same: Sequence[Row]) -> str:
    """The title of one row of several results; its second line has the knobs that all share."""
    knobs = same[0].knobs
    for row in same:
        knobs = {name: value for name, value in knobs.items() if row.knobs.get(name) == value}
    return row_title(replace(same[0], knobs=knobs)).replace(" (", "\n(")


@contextmanager
def new_plot(path: Path, **legend: Any) -> Iterator[None]:
    """Plot inside `with`; on exit the figure gets its legend, if any, and is saved."""
    with plt.rc_context(STYLE):
        yield
        figure = plt.gcf()
        if legend:
            figure.legend(loc="outside upper right", frameon=False, **legend)
        save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Write a PNG; it appears under its name only when it is whole."""
    with written(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    plt.close(figure)


def plot(results: Sequence[Results], path: Path) -> None:
    """Bars of the average score: a group for each row, a colour for each start of A."""
    names = [shared_title(same) for same in zip(*(result.rows for result in results))]
    measure = results[0].measure
    averages = [measure.factor * frame(result)["average"] for result in results]
    table = pd.DataFrame(averages, [result.init for result in results]).T.set_axis(names)
    look = {"color": COLOURS, "width": 0.8, "fontsize": 8, "rot": 0, "legend": False}
    with new_plot(path, title="start of A", ncols=len(results)):
        axes = table.plot.bar(figsize=(1.6 + 1.5 * len(names), 4), **look)
        for bars in axes.containers:
            axes.bar_label(bars, fmt=f"%{measure.form}", fontsize=8)
        tasks = f"{len(results[0].tasks)} tasks ({measure.unit})"
        axes.set_ylabel(f"average {measure.name} of {tasks}")


def plot_tasks(results: Results, path: Path) -> None:
    """Bars of every task's score: a field for each task, a bar for each row."""
    tasks, measure = list(results.tasks), results.measure
    table = measure.factor * frame(results).set_index("row")[tasks][::-1]
    columns = min(4, len(tasks))
    lines = -(-len(tasks) // columns)
    size = (1.6 + 2.2 * columns, 0.8 + lines * (0.6 + 0.2 * len(table)))
    look = {"color": COLOURS[0], "width": 0.8, "fontsize": 7, "legend": False, "ylabel": ""}
    grid = {"subplots": True, "layout": (lines, columns), "figsize": size, "sharey": True}
    with new_plot(path):
        fields = table.plot.barh(**grid, **look)
        for axes, task in zip(fields.flat, tasks):
            form = "%.2f" if measure is LOSS else "%.0f"
            axes.bar_label(axes.containers[0], fmt=form, fontsize=7)
            axes.set_title(f"{task}, {results.metric(task)}".replace("_", " "), fontsize=8)


def plot_search(search: Mapping[str, Search], measure: Measure, path: Path) -> None:
    """The average held-out score against λ: a curve for each method, its best λ a star."""
    with new_plot(path, ncols=len(search)):
        axes = plt.figure(figsize=(6, 4)).gca()
        for colour, (method, curve) in zip(cycle(COLOURS), search.items()):
            average = [measure.factor * score for score in curve.average]
            label = f"{method} (best λ: {curve.best:g})"
            axes.plot(curve.grid, average, "o-", color=colour, markersize=4, label=label)
            height = average[curve.grid.index(curve.best)]
            axes.plot(curve.best, height, "*", color=colour, markersize=15, markeredgecolor="white")
            tasks = f"{len(curve.scores)} tasks ({measure.unit})"
            axes.set_ylabel(f"average held-out {measure.name} of {tasks}")
        axes.set_xlabel("λ")


def diagnosis_tables(diagnosis: Diagnosis) -> str:
    """Markdown tables of the shifts, of each task and of each merge, and how to read them."""
    tasks = list(diagnosis.tasks)
    energy, shift = diagnosis.energy_before.overall, 100 * diagnosis.shift.overall
    shifts = pd.DataFrame(shift.numpy(), columns=tasks)
    shifts.insert(0, "adapter \\ data", tasks)
    overlap, conflict = diagnosis.overlap.overall, diagnosis.sign_conflict.overall
    adapters = pd.DataFrame(
        {
            "adapter": tasks,
            "energy, own": energy.diagonal(),
            "energy, others": off_diagonal(energy).nanmean(-1),
            "shift, own": shift.diagonal(),
            "shift, others": off_diagonal(shift).nanmean(-1),
            "drift of A": diagnosis.drift.overall,
            "A in start": diagnosis.kept_in_start.overall,
            "norm": diagnosis.norm.overall,
            "A overlap": off_diagonal(overlap).nanquantile(0.5, -1),
            "sign conflict": off_diagonal(conflict).nanquantile(0.5, -1),
        }
    )
    parts = [
        f"{markdown(shifts)}\n\n"
        "How far the adapter (row) shifts what the layers put out on data of a task (column),"
        " × 100: ‖ΔW Xᵀ‖ / ‖W0 Xᵀ‖ over all layers. The diagonal is wanted, the rest is"
        " interference. Shift of other tasks / own shift, mean of the adapters:"
        f" {cell(diagnosis.cross_over_own)}.\n",
        f"{markdown(adapters)}\n\n"
        "Energy: of the inputs along A before training; 1 is that of random directions. Shift: as"
        " above. Drift of A: ‖change‖ / ‖start‖. A in start: share of the trained A's squared norm"
        " inside the row space of its start. Norm: ‖ΔW‖ over all layers. A overlap: cosine of the"
        " angles between the row spaces of two tasks' trained A; 0 is orthogonal. Sign conflict:"
        " share of entries of opposite signs in two tasks' ΔW. Others: the mean over the other"
        " tasks; of overlap and conflict the median.\n",
    ]
    if diagnosis.merge_error:
        errors = {name: 100 * error.overall for name, error in diagnosis.merge_error.items()}
        rows = [[name, *error.tolist(), float(error.nanmean())] for name, error in errors.items()]
        merges = pd.DataFrame(rows, columns=["merged by", *tasks, "average"])
        parts.append(
            f"{markdown(merges)}\n\n"
            "Error × 100 of the merged update M on each task's own data:"
            " ‖(M - ΔW) Xᵀ‖ / ‖W0 Xᵀ‖ over all layers. 0: the task's own adapter exactly; as large"
            " as its own shift: no better than no update.\n"
        )
    return "\n".join(parts)


def heat_map(diagnosis: Diagnosis, path: Path) -> None:
    """The overall relative shifts × 100 as coloured squares: rows adapters, columns data."""
    tasks, shift = diagnosis.tasks, 100 * diagnosis.shift.overall
    side = 2 + 0.6 * len(tasks)
    with new_plot(path):
        figure, axes = plt.subplots(figsize=(side + 0.8, side))
        image = axes.imshow(shift.numpy(), cmap="Blues", vmin=0)
        for (i, j), value in np.ndenumerate(shift):
            colour = "white" if value > 0.6 * shift.max() else "black"
            axes.text(j, i, cell(value), ha="center", va="center", fontsize=8, color=colour)
        axes.set_xticks(range(len(tasks)), tasks, rotation=45, fontsize=8)
        axes.set_yticks(range(len(tasks)), tasks, fontsize=8)
        axes.set(xlabel="data of", ylabel="adapter of")
        figure.colorbar(image, label="relative shift (× 100)")


def layer_plot(diagnosis: Diagnosis, path: Path) -> None:
    """Own and other tasks' relative shift against the layer, a colour for each projection.

    The modules of one last name (query, value) are a projection; their order gives the layers.
    """
    shift = 100 * diagnosis.shift.modules
    own, others = shift.diagonal(dim1=-2, dim2=-1), off_diagonal(shift).flatten(1)
    layers = pd.DataFrame({"own": own.nanmean(1), "others": others.nanmean(1)})
    names = pd.Series([module.rpartition(".")[2] for module in diagnosis.modules])
    with new_plot(path, title="projection, data of", ncols=names.nunique()):
        axes = plt.figure(figsize=(7, 4)).gca()
        for colour, name in zip(cycle(COLOURS), names.unique()):
            projection = layers[names == name].reset_index(drop=True).add_prefix(f"{name}, ")
            projection.plot(ax=axes, style=["-", "--"], marker=".", color=colour, legend=False)
        axes.set_ylim(bottom=0)
        axes.locator_params(axis="x", integer=True)
        axes.set(xlabel="layer", ylabel="relative shift of the outputs (× 100)")


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="One table and plot out of several merges.")
    parser.add_argument("results", nargs="+", type=Path, help="results.json files of merge.py")
    parser.add_argument("--output-dir", type=Path, required=True, help="for table.md and plot.png")
    return parser.parse_args()


def main() -> None:
    """Read the files, print one table, save it with a plot."""
    arguments = read_arguments()
    results = [Results.read(path) for path in arguments.results]
    for path, result in zip(arguments.results, results):
        if [row.name for row in result.rows] != [row.name for row in results[0].rows]:
            raise UserError(f"{path}: other methods than {arguments.results[0]}; merge them alike")
        if [result.measure, *result.tasks] != [results[0].measure, *results[0].tasks]:
            raise UserError(f"{path}: other tasks than {arguments.results[0]}; merge them alike")
    text = score_table(results)
    write_text(arguments.output_dir / "table.md", text)
    plot(results, arguments.output_dir / "plot.png")
    print(text)


if __name__ == "__main__":
    raise SystemExit(run_script(main))
