"""Tables and plots out of results.json files: python -m osrm.report A/results.json B/results.json

Every number is recomputed from the scores in the files; nothing is trained or evaluated here.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from osrm.config import read_json
from osrm.errors import UserError, run_script
from osrm.glue import TASKS
from osrm.runs import write_text

Results = Mapping[str, Any]
"""The content of a results.json: {"init", "rows": [{"name", "scores", "average", ...}], ...}

With --search also {"search": {method: {"grid": [λ], "scores": {task: [score]}, "average", "best"}}}
"""

# Okabe and Ito's colours, distinct for colour-blind readers.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")


def rows(
    metrics: Mapping[str, Mapping[str, Mapping[str, float]]],
    knobs: Mapping[str, Mapping[str, Any]],
    costs: Mapping[str, Mapping[str, float]],
) -> list[dict[str, Any]]:
    """The rows of a results.json: each task's score, their average, the normalised average.

    The normalised average is the mean over the tasks of score / score of the task's own adapter;
    tasks on which that adapter scores 0 or less have no such ratio and do not count.
    """
    scores = {
        row: {task: values[f"eval_{TASKS[task].score}"] for task, values in by_task.items()}
        for row, by_task in metrics.items()
    }
    own = scores["individual"]
    found = []
    for row, by_task in scores.items():
        ratios = [by_task[task] / own[task] for task in own if own[task] > 0]
        found.append(
            {
                "name": row,
                "knobs": dict(knobs.get(row, {})),
                "scores": by_task,
                "average": mean(by_task.values()),
                "normalised_average": mean(ratios) if ratios else None,
                **costs.get(row, {}),
                "metrics": {task: dict(values) for task, values in metrics[row].items()},
            }
        )
    return found


def table(results: Sequence[Results]) -> str:
    """The Markdown table: a row for each method and start, a column for each task."""
    tasks = list(results[0]["tasks"])
    head = ["start", "row", *tasks, "average", "normalised"]
    lines = [head, ["---", "---", *["---:"] * (len(head) - 2)]]
    for each in results:
        for row in each["rows"]:
            ratio = row["normalised_average"]
            numbers = [*(row["scores"][task] for task in tasks), row["average"]]
            cells = [f"{100 * number:.1f}" for number in numbers]
            cells.append("–" if ratio is None else f"{100 * ratio:.1f}")
            lines.append([each["init"], row_title(row), *cells])
    text = markdown(lines)
    scored = ", ".join(f"{task} {TASKS[task].score.replace('_', ' ')}" for task in tasks)
    return (
        f"{text}\n\nScores × 100: {scored}. Normalised: mean of each task's score divided by its"
        " own adapter's.\n"
    )


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table of cells, the columns aligned."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |"
        for line in lines
    )


def cost_table(results: Results) -> str:
    """The Markdown table of what each merge has cost and kept."""
    lines = [["row", "kept", "seconds", "peak memory, GiB", "size, MiB"]]
    lines.append(["---", *["---:"] * 4])
    for each in results["rows"]:
        if "merge_seconds" in each:
            numbers = ("kept", "merge_seconds", "merge_peak_gib", "size_mib")
            lines.append([each["name"], *(f"{each[name]:.2f}" for name in numbers)])
    conditions = [each["condition"] for each in results["rows"] if "condition" in each]
    solved = (
        f" RegMean's equations have condition numbers up to {max(conditions):.1e}."
        if conditions
        else ""
    )
    return (
        f"{markdown(lines)}\n\nKept: ⟨merged, own⟩ / ‖own‖² of the update that a task receives and"
        " its own, mean over the tasks. Size: of the stored update."
        f"{solved} A layer that an adapter leaves out counts as a zero update of its task.\n"
    )


def write_csv(results: Results, path: Path) -> None:
    """The table for spreadsheets and scripts, scores as they are."""
    costs = ("kept", "merge_seconds", "merge_peak_gib", "size_mib")
    tasks = list(results["tasks"])
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["init", "row", "knobs", *tasks, "average", "normalised_average", *costs])
        for each in results["rows"]:
            scores = [each["scores"][task] for task in tasks]
            rest = [each["average"], each["normalised_average"], *map(each.get, costs)]
            writer.writerow(
                [results["init"], each["name"], json.dumps(each["knobs"]), *scores, *rest]
            )


def row_title(row: Mapping[str, Any]) -> str:
    """A method with its knobs, e.g. `ties (density 0.2, scale 1)`."""
    knobs = ", ".join(
        f"{name} {value:g}" if isinstance(value, int | float) else f"{name} {value}"
        for name, value in row["knobs"].items()
    )
    return f"{row['name']} ({knobs})" if knobs else str(row["name"])


def shared_title(same: Sequence[Mapping[str, Any]]) -> str:
    """The title of one row of several results, without knobs that differ, as a searched λ may.

    The knobs stand on a line of their own.
    """
    knobs = {
        knob: value
        for knob, value in same[0]["knobs"].items()
        if all(row["knobs"].get(knob) == value for row in same)
    }
    return row_title({"name": same[0]["name"], "knobs": knobs}).replace(" (", "\n(")


def plot(results: Sequence[Results], path: Path) -> None:
    """Bars of the average score: a group for each row, a colour for each start of A."""
    names = [shared_title(same) for same in zip(*(each["rows"] for each in results))]
    figure, axes = plt.subplots(figsize=(1.6 + 1.5 * len(names), 4), layout="constrained")
    width = 0.8 / len(results)
    for i, each in enumerate(results):
        places = [place + (i - (len(results) - 1) / 2) * width for place in range(len(names))]
        heights = [100 * row["average"] for row in each["rows"]]
        bars = axes.bar(places, heights, width, label=each["init"], color=COLOURS[i % len(COLOURS)])
        axes.bar_label(bars, fmt="%.1f", fontsize=8)
    axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.set_ylabel(f"average score of {len(results[0]['tasks'])} tasks (× 100)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(title="start of A", frameon=False, ncols=len(results), loc="outside upper right")
    save(figure, path)


def plot_tasks(results: Results, path: Path) -> None:
    """Bars of every task's score: a field for each task, a bar for each row."""
    rows, tasks = results["rows"][::-1], list(results["tasks"])
    columns = min(4, len(tasks))
    lines = -(-len(tasks) // columns)
    size = (1.6 + 2.2 * columns, 0.8 + lines * (0.6 + 0.2 * len(rows)))
    figure, fields = plt.subplots(
        lines, columns, figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    for axes, task in zip(fields.flat, tasks):
        heights = [100 * row["scores"][task] for row in rows]
        bars = axes.barh(range(len(rows)), heights, color=COLOURS[0])
        axes.bar_label(bars, fmt="%.0f", fontsize=7)
        axes.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=7)
        axes.set_title(f"{task}, {TASKS[task].score.replace('_', ' ')}", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in [*fields.flat][len(tasks) :]:
        axes.set_visible(False)
    save(figure, path)


def plot_search(search: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """The average held-out score against λ: a curve for each method, its best λ a star.

    Args:
        search: what a results.json has under that name.
    """
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for i, (method, found) in enumerate(search.items()):
        colour = COLOURS[i % len(COLOURS)]
        heights = [100 * average for average in found["average"]]
        title = f"{method} (best λ: {found['best']:g})"
        axes.plot(found["grid"], heights, "o-", color=colour, markersize=4, label=title)
        height = heights[found["grid"].index(found["best"])]
        axes.plot(found["best"], height, "*", color=colour, markersize=15, markeredgecolor="white")
    axes.set_xlabel("λ")
    axes.set_ylabel(f"average held-out score of {len(found['scores'])} tasks (× 100)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, ncols=len(search), loc="outside upper right")
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Write a PNG; it appears under its name only when it is whole."""
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=150, format="png")
    temporary.replace(path)
    plt.close(figure)


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="One table and plot out of several merges.")
    parser.add_argument("results", nargs="+", type=Path, help="results.json files of merge.py")
    parser.add_argument("--output-dir", type=Path, required=True, help="for table.md and plot.png")
    return parser.parse_args()


def main() -> None:
    """Read the files, print one table, save it with a plot."""
    arguments = read_arguments()
    results = [read_json(path, "results") for path in arguments.results]
    for path, each in zip(arguments.results, results):
        if [row["name"] for row in each["rows"]] != [row["name"] for row in results[0]["rows"]]:
            raise UserError(f"{path}: other methods than {arguments.results[0]}; merge them alike")
        if list(each["tasks"]) != list(results[0]["tasks"]):
            raise UserError(f"{path}: other tasks than {arguments.results[0]}; merge them alike")
    text = table(results)
    write_text(arguments.output_dir / "table.md", text)
    plot(results, arguments.output_dir / "plot.png")
    print(text)


if __name__ == "__main__":
    raise SystemExit(run_script(main))
