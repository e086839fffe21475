"""The tables of a study's page. A table is a list of lines of cells; the first line is the head."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import mean
from typing import Any

import numpy as np
from intervals import Difference, holm, student
from plan import QUESTIONS, varied_runs
from simulation import reliability, resampled_differences
from study import REFERENCES, TASKS, TITLES, Array, Study, area, score, shared, spread

Table = list[list[str]]
METHODS = {
    "individual": "single task",
    "task_arithmetic": "task arithmetic",
    "ties": "TIES",
    "regmean": "RegMean",
    "tsv": "TSV",
    "emr": "EMR",
}
"""The rows that the tables of all runs show, and their titles."""
CURVES = ("task_arithmetic", "ties")
"""The methods whose scores are shown against λ and the number of tasks."""
CLAIMS = {
    ("analytical", "gaussian"): "OSRM's start beats LoRA's",
    ("analytical", "kaiming"): "OSRM's start beats PEFT's default, kaiming",
    ("kaiming", "gaussian"): "PEFT's default, kaiming, beats LoRA's gaussian start",
    ("gaussian-norm1", "gaussian"): "the norm helps: LoRA at norm 1 beats LoRA",
    ("analytical", "gaussian-norm1"): "the directions help: OSRM beats LoRA at norm 1",
    ("analytical", "orthogonal"): "the directions help: OSRM beats random frames",
    ("analytical", "release"): "the closed form helps: OSRM beats the release's code",
    ("contrastive", "gaussian"): "the contrastive start (ours) beats LoRA's",
    ("contrastive", "kaiming"): "the contrastive start (ours) beats PEFT's default, kaiming",
    ("contrastive", "gaussian-norm1"): "the contrastive start (ours) beats LoRA at norm 1",
    ("contrastive", "orthogonal"): "the contrastive start (ours) beats random frames",
    ("contrastive", "analytical"): "the contrastive start (ours) beats OSRM's",
    ("contrastive-shift", "gaussian"): "contrastive with a shift penalty (ours) beats LoRA's start",
    ("contrastive-shift", "kaiming"): "contrastive with a shift penalty beats PEFT's default",
    ("contrastive-shift", "orthogonal"): "contrastive with a shift penalty beats random frames",
    ("contrastive-shift", "analytical"): "contrastive with a shift penalty beats OSRM's",
    ("contrastive-shift", "contrastive"): "the shift penalty helps the contrastive start",
}
"""What is claimed of each pair of starts: the first beats the second."""
PLAIN = {
    "samples": "k100",
    "block": "qv",
    "freeze": "none",
    "rank": "rank8",
    "rate": "of the chosen rate",
    "features": "token",
}
"""{question: the setting of a start's plain run, which its variations change}"""


def title(run: str) -> str:
    """A run's name in the tables: its start and its variation."""
    start, _, variation = run.partition("+")
    return f"{TITLES[start]}, {variation}" if variation else TITLES[start]


def main_table(study: Study) -> Table:
    """Average score of each row and start, mean ± standard deviation; the mean merging loss."""
    head, *lines = start_table(study, "average")
    for line in lines:
        losses = [study.values(start, line[0], "loss").values() for start in study.starts]
        line[1:-1] = [
            f"{cell} ({100 * mean(each):.1f})" if each else cell
            for cell, each in zip(line[1:-1], losses)
        ]
    for name, choose in CONSTANTS.items():
        middle = f"{100 * mean(constants(study, choose).values() or [0.0]):.1f}"
        lines.append([name, *[middle] * len(study.starts), "–"])
    seeds = [str(len(study.records[start])) for start in study.starts]
    training = ["training, s", *seconds(study, study.starts), "–"]
    return [head, *lines, ["seeds", *seeds, "–"], training]


def start_table(study: Study, what: str) -> Table:
    """One value × 100 of each row and start, and the time of the merge."""
    lines = [["", *(TITLES[start] for start in study.starts), "merge, s"]]
    for row in study.rows:
        cells = [spread([*study.values(start, row, what).values()]) for start in study.starts]
        lines.append([row, *cells, merging(study, study.starts, [row])])
    return lines


def seconds(study: Study, runs: Iterable[str]) -> list[str]:
    """Wall time of training all tasks, mean over the seeds; – if nothing was trained."""
    cells = []
    for run in runs:
        records = study.records.get(run, {}).values()
        times = [r["training"]["seconds"] for r in records if "seconds" in r["training"]]
        cells.append(f"{mean(times):.0f}" if times else "–")
    return cells


def merging(study: Study, runs: Iterable[str], rows: Iterable[str]) -> str:
    """Wall time of merging all tasks with these methods, one after the other."""
    times = []
    for row in rows:
        costs = [t for run in runs for t in study.values(run, row, "merge_seconds").values()]
        times += [mean(costs)] if costs else []
    return f"{sum(times):.2g}" if times else "–"


def scale_table(study: Study) -> Table:
    """The λ chosen on held-out data, by seed, and the time of the merge."""
    methods = [row for row in study.rows if any(study.scales(s, row) for s in study.starts)]
    lines = [["", *(TITLES[start] for start in study.starts), "merge, s"]]
    for method in methods:
        cells = [
            " ".join(f"{scale:g}" for scale in study.scales(start, method)) or "–"
            for start in study.starts
        ]
        lines.append([method, *cells, merging(study, study.starts, [method])])
    return lines


def task_table(study: Study, row: str) -> Table:
    """Each task's score of one row, and of constant answers."""
    starts = {start: study.scores(start, row) for start in study.starts}
    tasks = [task for task in TASKS if any(task in scores for scores in starts.values())]
    lines = [["", *tasks, "training, s"]]
    for start, scores in starts.items():
        cells = [spread(scores.get(task, [])) for task in tasks]
        lines.append([TITLES[start], *cells, *seconds(study, [start])])
    for name, choose in CONSTANTS.items():
        means = constants(study, choose)
        cells = [f"{100 * means[task]:.1f}" if task in means else "–" for task in tasks]
        lines.append([name, *cells, "0"])
    return lines


def constants(study: Study, choose: Callable[[str, Array], float]) -> dict[str, float]:
    """{task: the score of one answer to all examples, mean over the seeds of all starts}.

    Args:
        choose: gives that score for a task and its labels (examples,).
    """
    scores: dict[str, list[float]] = {}
    for start in study.starts:
        for seed in study.records[start]:
            table = study.predictions(start, seed)
            if table is not None:
                for task, part in table[table.split == ""].groupby("task", sort=False):
                    scores.setdefault(task, []).append(choose(task, part.label.to_numpy(float)))
    return {task: mean(values) for task, values in scores.items()}


def constant_score(task: str, answer: float, labels: Array) -> float:
    """The task's score if every example gets this answer; correlations are 0 then."""
    return float(score(task, np.full(len(labels), answer), labels))


def most_frequent(task: str, labels: Array) -> float:
    """The score of the most frequent label; 0 for a regression, as for any constant."""
    values, counts = np.unique(labels, return_counts=True)
    return constant_score(task, values[counts.argmax()], labels)


def best_constant(task: str, labels: Array) -> float:
    """The score of the best constant. By F1 that may be the rarer label, as in qqp."""
    return max(constant_score(task, value, labels) for value in np.unique(labels))


CONSTANTS = {"most frequent label": most_frequent, "best constant": best_constant}


def difference_table(study: Study, what: str = "average") -> Table:
    """Paired differences × 100 of the starts with their 95 % intervals."""
    pairs = [pair for pair in CLAIMS if set(pair) <= {*study.starts}]
    found = {
        f"{title(run)} − {title(other)}": study.differences(run, other, what)
        for run, other in pairs
    }
    return by_row(study, found)


def method_table(study: Study) -> Table:
    """Each method less task arithmetic, paired by seed; the methods are one family."""
    found = {}
    for start in study.starts:
        base = study.values(start, "task_arithmetic")
        family = {}
        for row in {*study.rows} - {*REFERENCES, "task_arithmetic"}:
            values = study.values(start, row)
            each = student({seed: values[seed] - base[seed] for seed in shared(values, base)})
            family |= {row: each} if each else {}
        found[title(start)] = holm(family)
    return by_row(study, found)


def by_row(study: Study, found: Mapping[str, Mapping[str, Difference]]) -> Table:
    """A column for each {row: difference}."""
    lines = [["", *found]]
    for row in study.rows:
        if any(row in column for column in found.values()):
            lines.append([row, *(str(column.get(row, "–")) for column in found.values())])
    return lines


def reliability_table(study: Study) -> Table:
    """What the intervals of few and of many seeds hold, and which differences they find."""
    scores = resampled_differences(study, [*CLAIMS])
    count = len({*study.rows} - {*REFERENCES})
    head = ["seeds", "intervals with the truth, %", "families with a false *, %"]
    lines = [[*head, "found, one method", f"found, {count} methods"]]
    for seeds in (3, 5, 8, 10, 16) if scores else ():
        found = reliability(scores, seeds)
        shares = [
            f"{100 * min(each):.1f} to {100 * max(each):.1f}"
            for each in (found.coverage, found.false)
        ]
        lines.append([str(seeds), *shares, f"{found.alone:.1f}", f"{found.corrected:.1f}"])
    return lines


def contrasts(question: str) -> list[tuple[str, str]]:
    """What a question compares: each variation with the plain run, and the starts in `CLAIMS`.

    Other numbers of tasks have other examples, so only starts are compared there. Where LoRA does
    not depend on the variation (such as the features), its plain run is used.
    """
    asked, pairs = QUESTIONS[question], []
    for run in varied_runs(question):
        start, plus, variation = run.partition("+")
        if variation and "subsets" not in asked:
            pairs.append((run, start))
        if start == "gaussian":
            continue
        for other in dict.fromkeys(["gaussian", *(b for a, b in CLAIMS if a == start)]):
            if other in asked["starts"]:
                pairs.append((run, other + plus + variation))
            elif other == "gaussian":
                pairs.append((run, other))
    return pairs


def shown_rows(study: Study, runs: Iterable[str]) -> list[str]:
    """Which of `METHODS` any of these runs has."""
    return [row for row in METHODS if any(study.values(run, row) for run in runs)]


def contrast_table(study: Study, question: str) -> Table:
    """The paired differences of one question."""
    asked = [run for run in varied_runs(question) if "+" in run]
    shown = shown_rows(study, asked)
    lines = [["", "seeds", *(METHODS[row] for row in shown)]]
    for run, other in contrasts(question):
        found = study.differences(run, other)
        cells = [str(found.get(row, "–")) for row in shown]
        seeds = str(len(study.paired(run, other)) or "not run yet")
        lines.append([f"{title(run)} − {title(other)}", seeds, *cells])
    return lines


def rate_table(rates: dict[str, Any]) -> Table:
    """The mean selection score of each rate that was tried, and the chosen rate."""
    tried = [*dict.fromkeys(rate for choice in rates.values() for rate in choice["tried"])]
    lines = [["", *tried, "chosen"]]
    for start, choice in rates.items():
        means = choice["tried"]
        cells = [spread([means[rate]] if rate in means else []) for rate in tried]
        lines.append([title(start), *cells, choice["lr"]])
    return lines


def area_table(study: Study) -> Table:
    """The curve of the held-out average against λ: mean height, best value, their ratio."""
    measures: dict[str, Callable[[list[float], list[float]], float]] = {
        "area": area,
        "best": lambda grid, scores: max(scores),
        "area / best": lambda grid, scores: area(grid, scores) / max(scores),
    }
    head = [f"{method}, {what}" for method in CURVES for what in measures]
    lines = [["", *head, "training, s"]]
    for start in study.starts:
        cells = [
            spread([measure(*curve) for curve in curves(study, start, method).values()])
            for method in CURVES
            for measure in measures.values()
        ]
        lines.append([TITLES[start], *cells, *seconds(study, [start])])
    return lines


def curves(study: Study, run: str, method: str) -> dict[int, tuple[list[float], list[float]]]:
    """{seed: (λ, held-out averages)}, for the λ of all runs: a search may go on beyond its grid."""
    searches = {
        (name, seed): dict(
            zip(record["search"][method]["grid"], record["search"][method]["average"])
        )
        for name, records in study.records.items()
        for seed, record in records.items()
        if method in record["search"]
    }
    grid = sorted(set.intersection(*map(set, searches.values()))) if searches else []
    return {
        seed: (grid, [averages[scale] for scale in grid])
        for (name, seed), averages in searches.items()
        if name == run
    }


def run_table(study: Study, runs: Sequence[str]) -> Table:
    """A line per run: scores, energies along A before training, drift, shifts, times."""
    shown = shown_rows(study, [run for run in runs if "+" in run] or runs)
    head = ["", "seeds", *(METHODS[row] for row in shown)]
    head += ["A: own energy", "A: others'", "overlap", "drift of A", "shift, own", "shift, others"]
    head += ["merges, s"]
    lines = [[*head, "training, s"]]
    for run in runs:
        if run not in study.records:
            lines.append([title(run), "not run yet", *["–"] * (len(head) - 1)])
            continue
        scores = [spread([*study.values(run, row).values()]) for row in shown]
        records = study.records[run].values()
        inner = [
            spread([v for r in records if (v := measure(r)) is not None], factor, digits)
            for measure, factor, digits in MEASURES
        ]
        times = [merging(study, [run], shown), *seconds(study, [run])]
        lines.append([title(run), str(len(records)), *scores, *inner, *times])
    return lines


def known_mean(values: np.ndarray) -> float | None:
    """The mean without NaN; None if all are NaN."""
    return None if np.isnan(values).all() else float(np.nanmean(values))


def side(table: str, own: bool) -> Callable[[dict[str, Any]], float | None]:
    """The mean of the diagonal of a T × T table, or of the other entries."""

    def measure(record: dict[str, Any]) -> float | None:
        matrix = np.array(record["interference"][table], dtype=float)
        chosen = np.eye(len(matrix), dtype=bool)
        return known_mean(matrix[chosen if own else ~chosen])

    return measure


def drift(record: dict[str, Any]) -> float | None:
    """‖change of A‖ / ‖start of A‖, mean over the tasks."""
    return known_mean(np.array(record["interference"]["drift"], dtype=float))


MEASURES = [
    (side("energy_before", True), 1, 2),
    (side("energy_before", False), 1, 2),
    (side("overlap", False), 1, 2),
    (drift, 1, 2),
    (side("shift", True), 100, 1),
    (side("shift", False), 100, 1),
]


def size_table(study: Study) -> Table:
    """Normalised average × 100 against the number of merged tasks."""
    asked = QUESTIONS["tasks"]
    endings = {f"+{name}": str(count) for name, count in asked["subsets"].items()} | {"": "all"}
    head = [f"{method}, {n}" for method in CURVES for n in endings.values()]
    lines = [["", *head, "training, s"]]
    for start in asked["starts"]:
        cells = [
            spread([*study.values(start + end, method, "normalised_average").values()])
            for method in CURVES
            for end in endings
        ]
        lines.append([TITLES[start], *cells, *seconds(study, [start])])
    return lines
