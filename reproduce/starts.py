"""Table, numbers and plot of the study of starts and transforms: see starts.smk.

python reproduce/starts.py .save_dir/starts ARM... --output-dir .save_dir/starts/report
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from osrm.report import COLOURS, save
from osrm.runs import write_json, write_text

METHODS = ("task_arithmetic", "ties", "emr")
COLUMNS = {
    "individual": "single task",
    "task_arithmetic": "task arithmetic",
    "ties": "TIES",
    "emr": "EMR",
    "energy_own": "A: energy, own",
    "energy_others": "A: energy, others",
    "overlap": "A: overlap",
    "shift_own": "shift, own",
    "shift_others": "shift, others",
    "error": "error, merged",
}
SCORES = ("individual", *METHODS)


def numbers(directory: Path) -> dict[str, Any]:
    """One run's row: average scores × 100, chosen λ, interference."""
    results = json.loads((directory / "results.json").read_text())
    found = json.loads((directory / "interference.json").read_text())
    rows = {row["name"]: row for row in results["rows"]}
    tasks = range(len(found["tasks"]))

    def own(table: str) -> float:
        overall = found[table]["overall"]
        return mean(overall[i][i] for i in tasks if overall[i][i] is not None)

    def others(table: str) -> float:
        overall = found[table]["overall"]
        return mean(
            overall[i][j] for i in tasks for j in tasks if i != j and overall[i][j] is not None
        )

    has_start = found["energy_before"]["overall"][0][0] is not None
    return {
        **{name: 100 * rows[name]["average"] for name in SCORES},
        "scale": {name: rows[name]["knobs"].get("scale") for name in METHODS},
        "energy_own": own("energy_before") if has_start else None,
        "energy_others": others("energy_before") if has_start else None,
        "overlap": others("overlap"),
        "shift_own": 100 * own("shift"),
        "shift_others": 100 * others("shift"),
        "error": 100 * mean(found["merge_error"]["task_arithmetic"]["overall"]),
        "tasks": {name: {t: 100 * s for t, s in rows[name]["scores"].items()} for name in SCORES},
    }


def spread(values: Sequence[float | None], digits: int) -> str:
    """Mean ± standard deviation over the seeds."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    text = f"{mean(known):.{digits}f}"
    return f"{text} ± {stdev(known):.{digits}f}" if len(known) > 1 else text


def table(runs: dict[str, dict[str, dict[str, Any]]]) -> str:
    """A row for each start or transform: mean ± standard deviation over its seeds."""
    lines = [["", "seeds", *COLUMNS.values()], ["---", *["---:"] * (len(COLUMNS) + 1)]]
    for arm, seeds in runs.items():
        cells = [
            spread([row[column] for row in seeds.values()], 1 if column in SCORES else 2)
            for column in COLUMNS
        ]
        lines.append([arm, str(len(seeds)), *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def plot(runs: dict[str, dict[str, dict[str, Any]]], path: Path) -> None:
    """Average score of each method: a point for each seed, a bar for their mean."""
    figure, axes = plt.subplots(figsize=(2 + 1.1 * len(runs), 4.5), layout="constrained")
    for i, method in enumerate(SCORES):
        for place, seeds in enumerate(runs.values()):
            x = place + (i - (len(SCORES) - 1) / 2) * 0.2
            heights = [row[method] for row in seeds.values()]
            label = COLUMNS[method] if place == 0 else None
            axes.bar(x, mean(heights), 0.18, color=COLOURS[i], alpha=0.5, label=label)
            axes.plot([x] * len(heights), heights, ".", color=COLOURS[i])
    axes.set_xticks(range(len(runs)), runs, rotation=30, ha="right", fontsize=8)
    axes.set_ylim(
        bottom=min(row[m] for s in runs.values() for row in s.values() for m in SCORES) - 3
    )
    axes.set_ylabel("average score of the tasks (× 100)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, ncols=len(SCORES), loc="outside upper right")
    save(figure, path)


def main() -> None:
    """Read every <arm>/<seed>/merged below the folder, write table.md, results.json, plot.png."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("arms", nargs="+", help="in the order of the table")
    parser.add_argument("--output-dir", type=Path, required=True)
    arguments = parser.parse_args()
    runs = {}
    for arm in arguments.arms:
        found = sorted((arguments.directory / arm).glob("*/merged/results.json"))
        runs[arm] = {path.parts[-3]: numbers(path.parent) for path in found}
    text = table(runs)
    write_json(arguments.output_dir / "results.json", runs)
    write_text(arguments.output_dir / "table.md", text)
    plot(runs, arguments.output_dir / "plot.png")
    print(text)


if __name__ == "__main__":
    main()
