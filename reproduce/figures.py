"""The figures of a study's page, as PNG files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from plan import QUESTIONS, STARTS
from study import TITLES, Study
from tables import CURVES, curves

from osrm.report import COLOURS, save

STYLE = dict(zip(STARTS, zip(COLOURS, "osD^vXP*")))
"""{start: (colour, marker)}, the same in all figures."""


def lambda_curves(study: Study, path: Path) -> None:
    """Held-out average against λ; the band is the standard deviation over the seeds."""
    figure, fields = plt.subplots(1, 2, figsize=(9, 4), sharey=True, layout="constrained")
    for axes, method in zip(fields, CURVES):
        for start in study.starts:
            pairs = [*curves(study, start, method).values()]
            if not pairs:
                continue
            colour, marker = STYLE[start]
            grid, heights = pairs[0][0], 100 * np.array([scores for _, scores in pairs])
            middle, width = heights.mean(0), heights.std(0)
            axes.plot(grid, middle, marker + "-", color=colour, label=TITLES[start], markersize=5)
            axes.fill_between(grid, middle - width, middle + width, color=colour, alpha=0.12)
        axes.set_title(method, fontsize=10)
        axes.set_xlabel("λ")
    fields[0].set_ylabel("average held-out score (× 100)")
    finish(figure, path)


def size_curves(study: Study, path: Path) -> None:
    """Normalised average against the number of merged tasks."""
    asked = QUESTIONS["tasks"]
    figure, fields = plt.subplots(1, 2, figsize=(9, 4), sharey=True, layout="constrained")
    for axes, method in zip(fields, CURVES):
        for start in asked["starts"]:
            ends = {len(study.records[start][s]["tasks"]): "" for s in study.records.get(start, {})}
            points = {
                count: [*study.values(start + end, method, "normalised_average").values()]
                for end, count in [(f"+{n}", c) for n, c in asked["subsets"].items()]
                + [(end, count) for count, end in ends.items()]
            }
            points = {count: values for count, values in points.items() if values}
            if not points:
                continue
            colour, marker = STYLE[start]
            heights = [100 * mean(values) for values in points.values()]
            spreads = [100 * stdev(v) if len(v) > 1 else 0.0 for v in points.values()]
            style = {"color": colour, "label": TITLES[start], "capsize": 3, "markersize": 5}
            axes.errorbar([*points], heights, spreads, fmt=marker + "-", **style)
        axes.set_title(method, fontsize=10)
        axes.set_xlabel("number of merged tasks")
        axes.xaxis.get_major_locator().set_params(integer=True)
    fields[0].set_ylabel("score / own adapter's (× 100)")
    finish(figure, path)


def heat_maps(study: Study, path: Path) -> None:
    """The relative shift of each task's outputs by each adapter, before merging."""
    shown = ("gaussian", "analytical", "contrastive")
    starts = [start for start in shown if start in study.starts] or study.starts[:1]
    shifts = {
        start: 100 * np.mean([table(run, "shift") for run in study.records[start].values()], 0)
        for start in starts
    }
    tasks = next(iter(study.records[starts[0]].values()))["tasks"]
    top = max(map(np.nanmax, shifts.values()))
    size = (1.5 + 3.2 * len(starts), 4)
    figure, fields = plt.subplots(1, len(starts), figsize=size, squeeze=False, layout="constrained")
    for axes, (start, shift) in zip(fields[0], shifts.items()):
        image = axes.imshow(shift, cmap="Blues", vmin=0, vmax=top)
        for i, j in np.ndindex(shift.shape):
            colour = "white" if shift[i, j] > 0.6 * top else "black"
            axes.text(
                j, i, f"{shift[i, j]:.2g}", ha="center", va="center", color=colour, fontsize=7
            )
        axes.set_title(TITLES[start], fontsize=10)
        axes.set_xticks(range(len(tasks)), tasks, rotation=60, fontsize=8)
        axes.set_yticks(range(len(tasks)), tasks, fontsize=8)
        axes.set_xlabel("data of")
    fields[0][0].set_ylabel("adapter of")
    figure.colorbar(image, ax=fields[0], label="relative shift (× 100)", shrink=0.8)
    save(figure, path)


def table(record: dict, name: str) -> np.ndarray:
    """One T × T table of a record's interference."""
    return np.array(record["interference"][name], dtype=float)


def layer_energies(study: Study, path: Path) -> None:
    """The energy of own and other tasks' features along A's start, layer by layer."""
    figure, fields = plt.subplots(1, 2, figsize=(9, 4), sharey=True, layout="constrained")
    chosen: dict[str, Callable[[int], np.ndarray]] = {
        "own features": lambda count: np.eye(count, dtype=bool),
        "other tasks' features": lambda count: ~np.eye(count, dtype=bool),
    }
    for axes, (title, mask) in zip(fields, chosen.items()):
        for start in study.starts:
            records = study.records[start].values()
            if not all(mask(len(record["tasks"])).any() for record in records):
                continue  # a single task has no others
            heights = [
                [
                    np.nanmean(np.array(layer, dtype=float)[mask(len(layer))])
                    for layer in record["interference"]["layers"]["energy_before"].values()
                ]
                for record in records
            ]
            colour, marker = STYLE[start]
            middle = np.mean(heights, 0)
            axes.plot(middle, marker + "-", color=colour, label=TITLES[start], markersize=4)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("adapted layer, in the order of the model")
        axes.set_yscale("log")
    fields[0].set_ylabel("energy along A (random directions: 1)")
    finish(figure, path)


def finish(figure: plt.Figure, path: Path) -> None:
    """Write the figure with one legend for both fields."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    handles = {
        label: handle
        for axes in figure.axes
        for handle, label in zip(*axes.get_legend_handles_labels())
    }
    style = {"frameon": False, "ncols": 3, "loc": "outside upper center", "fontsize": 9}
    figure.legend([*handles.values()], [*handles], **style)
    save(figure, path)
