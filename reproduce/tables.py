"""The tables of a study's page, each a head and lines of cells, and the verdicts on the claims."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from statistics import mean
from typing import Any

import numpy as np
from plan import QUESTIONS
from study import TITLES, Difference, Study, area, spread

from osrm.glue import TASKS

Table = list[list[str]]
METHODS = ("task_arithmetic", "ties", "emr")
"""What every run was merged with."""
PAIRS = [
    ("analytical", "gaussian"),
    ("analytical", "gaussian-norm1"),
    ("analytical", "orthogonal"),
    ("analytical", "release"),
    ("contrastive", "gaussian"),
    ("contrastive", "orthogonal"),
    ("contrastive", "analytical"),
]
PLAIN = {"samples": "k100", "block": "qv", "freeze": "none", "rank": "rank8", "features": "token"}
"""What the plain run of a start is called among the variations of a question."""


def title(run: str) -> str:
    """What a run is called: its start, and how it varies."""
    start, _, variation = run.partition("+")
    return f"{TITLES[start]}, {variation}" if variation else TITLES[start]


def main_table(study: Study) -> Table:
    """Average score of each row and start, mean ± standard deviation over the seeds."""
    lines = [["", *(TITLES[start] for start in study.starts)]]
    for row in study.rows:
        cells = [spread([*study.values(start, row).values()]) for start in study.starts]
        lines.append([row, *cells])
    seeds = [str(len(study.records[start])) for start in study.starts]
    return [*lines, ["seeds", *seeds], ["training, s", *seconds(study, study.starts)]]


def seconds(study: Study, runs: Iterable[str]) -> list[str]:
    """Wall time of the training of all tasks, mean over the seeds."""
    return [
        f"{mean(each['training']['seconds'] for each in study.records[run].values()):.0f}"
        for run in runs
    ]


def scale_table(study: Study) -> Table:
    """The λ chosen on held-out data, by seed, and the time that a merge takes."""
    methods = [row for row in study.rows if any(study.scales(s, row) for s in study.starts)]
    lines = [["", *(TITLES[start] for start in study.starts), "merge, s"]]
    for method in methods:
        cells = [
            " ".join(f"{scale:g}" for scale in study.scales(start, method)) or "–"
            for start in study.starts
        ]
        times = [t for s in study.starts for t in study.values(s, method, "merge_seconds").values()]
        lines.append([method, *cells, f"{mean(times):.1f}"])
    return lines


def task_table(study: Study, row: str) -> Table:
    """Each task's score of one row; and of always the same answer, the most frequent one."""
    record = next(iter(study.records[study.starts[0]].values()))
    lines = [["", *record["tasks"]]]
    for start in study.starts:
        found = study.scores(start, row)
        lines.append([TITLES[start], *(spread(found[task]) for task in record["tasks"])])
    return [*lines, ["always the same", *(f"{100 * v:.1f}" for v in majority(study).values())]]


def majority(study: Study) -> dict[str, float]:
    """{task: accuracy of the most frequent label; 0 where the score is a correlation}."""
    start = study.starts[0]
    seed, record = next(iter(study.records[start].items()))
    predictions = study.predictions(start, seed)
    found = {}
    for task in record["tasks"]:
        labels = predictions[(predictions.task == task) & (predictions.split == "")].label
        ((_, count),) = Counter(labels).most_common(1)
        found[task] = count / len(labels) if "accuracy" in TASKS[task].metrics else 0.0
    return found


def difference_table(study: Study) -> Table:
    """Paired differences × 100 with their 95 % intervals."""
    pairs = [pair for pair in PAIRS if set(pair) <= {*study.starts}]
    lines = [["", *(f"{TITLES[a]} − {TITLES[b]}" for a, b in pairs)]]
    for row in study.rows:
        cells = [study.difference(*pair, row) for pair in pairs]
        lines.append([row, *(str(cell or "–") for cell in cells)])
    return lines


def rate_table(rates: dict[str, Any]) -> Table:
    """The mean selection score of each rate tried, and the rate chosen."""
    tried = [*next(iter(rates.values()))["tried"]]
    lines = [["", *tried, "chosen"]]
    for start, found in rates.items():
        scores = [f"{100 * found['tried'][rate]:.1f}" for rate in tried]
        lines.append([TITLES[start], *scores, found["lr"]])
    return lines


def area_table(study: Study) -> Table:
    """Mean height of the curve of the held-out average against λ, and its best value."""
    lines = [["", *(f"{method}, {what}" for method in METHODS[:2] for what in ("area", "best"))]]
    for start in study.starts:
        cells = []
        for method in METHODS[:2]:
            found = curves(study, start, method)
            cells.append(spread([area(grid, scores) for grid, scores in found]))
            cells.append(spread([max(scores) for _, scores in found]))
        lines.append([TITLES[start], *cells])
    return lines


def curves(study: Study, run: str, method: str) -> list[tuple[list[float], list[float]]]:
    """(grid of λ, held-out averages) of every seed."""
    found = [each["search"].get(method) for each in study.records[run].values()]
    return [(each["grid"], each["average"]) for each in found if each]


def run_table(study: Study, runs: Sequence[str]) -> Table:
    """A line a run: scores, what A meets before training, how far it drifts, time."""
    head = ["", "seeds", "single task", "task arithmetic", "TIES", "EMR"]
    head += ["A: own energy", "A: others'", "overlap", "drift of A", "shift, own", "shift, others"]
    head += ["error, merged"]
    lines = [[*head, "training, s"]]
    for run in runs:
        if run not in study.records:
            lines.append([title(run), "not run yet", *["–"] * (len(head) - 1)])
            continue
        scores = [spread([*study.values(run, row).values()]) for row in ("individual", *METHODS)]
        records = study.records[run].values()
        inner = [
            spread([v for r in records if (v := measure(r)) is not None], factor, digits)
            for measure, factor, digits in MEASURES
        ]
        lines.append([title(run), str(len(records)), *scores, *inner, *seconds(study, [run])])
    return lines


def known_mean(values: np.ndarray) -> float | None:
    """The mean of what is not NaN; None if nothing is known."""
    return None if np.isnan(values).all() else float(np.nanmean(values))


def side(table: str, own: bool) -> Callable[[dict[str, Any]], float | None]:
    """The mean of a T × T table's diagonal, or of all else."""

    def measure(record: dict[str, Any]) -> float | None:
        matrix = np.array(record["interference"][table], dtype=float)
        chosen = np.eye(len(matrix), dtype=bool)
        return known_mean(matrix[chosen if own else ~chosen])

    return measure


def drift(record: dict[str, Any]) -> float | None:
    """‖change of A‖ / ‖its start‖, mean over the tasks."""
    return known_mean(np.array(record["interference"]["drift"], dtype=float))


def merge_error(record: dict[str, Any]) -> float:
    """‖(M − ΔW) Xᵀ‖ / ‖W0 Xᵀ‖ of the task-arithmetic merge M, mean over the tasks."""
    return mean(record["interference"]["error"]["task_arithmetic"])


MEASURES = [
    (side("energy_before", True), 1, 2),
    (side("energy_before", False), 1, 2),
    (side("overlap", False), 1, 2),
    (drift, 1, 2),
    (side("shift", True), 100, 1),
    (side("shift", False), 100, 1),
    (merge_error, 100, 1),
]


def size_table(study: Study) -> Table:
    """Normalised average × 100 against the number of merged tasks."""
    asked = QUESTIONS["tasks"]
    endings = {f"+{name}": str(count) for name, count in asked["subsets"].items()} | {"": "all"}
    lines = [["", *(f"{method}, {n}" for method in METHODS[:2] for n in endings.values())]]
    for start in asked["starts"]:
        cells = [
            spread([*study.values(start + end, method, "normalised_average").values()])
            for method in METHODS[:2]
            for end in endings
        ]
        lines.append([TITLES[start], *cells])
    return lines


def claim_table(study: Study) -> Table:
    """The paper's claims beside what was measured, and whether they show."""
    lines = [["claim", "known of the paper", "measured here", "verdict"]]
    for claim, known, (measured, verdict) in (
        (
            "merging from OSRM's start beats LoRA's, task arithmetic",
            "RoBERTa-large +6.55 (70.04 → 76.59)",
            judged(study.difference("analytical", "gaussian", "task_arithmetic")),
        ),
        (
            "the same with RegMean",
            "T5-large +3.76",
            judged(study.difference("analytical", "gaussian", "regmean")),
        ),
        *(
            (
                f"the same with {method}",
                "–",
                judged(study.difference("analytical", "gaussian", method)),
            )
            for method in ("ties", "fisher", "emr")
        ),
        (
            "its directions are the reason, not its norm: ahead of LoRA at norm 1",
            "–",
            judged(study.difference("analytical", "gaussian-norm1", "task_arithmetic")),
        ),
        (
            "and ahead of random directions",
            "–",
            judged(study.difference("analytical", "orthogonal", "task_arithmetic")),
        ),
        ("single-task scores within 1 %", "within 1 %", kept_within(study, 1.0)),
        ("more robust to λ: a larger area under its curve", "yes", robust(study)),
        ("the advantage grows with the number of tasks", "yes", grows(study)),
        (
            "the advantage shrinks with the size of the model",
            "yes",
            ("one model a study", "cannot be tested here"),
        ),
        (
            "ours: the contrastive start is ahead of OSRM's, task arithmetic",
            "–",
            judged(study.difference("contrastive", "analytical", "task_arithmetic")),
        ),
    ):
        lines.append([claim, known, measured, verdict])
    return lines


MISSING = ("–", "not run yet")


def judged(difference: Difference | None) -> tuple[str, str]:
    """The difference × 100 with its interval, and the verdict."""
    return (str(difference), difference.verdict) if difference else MISSING


def kept_within(study: Study, share: float) -> tuple[str, str]:
    """Are OSRM's single-task scores at most `share` % below LoRA's?"""
    found = study.difference("analytical", "gaussian", "individual")
    if found is None:
        return MISSING
    allowed = share * mean(study.values("gaussian", "individual").values())
    verdict = "shows here" if found.low > -allowed else "undecided here"
    return (
        f"{found}, allowed {-allowed:.2f}",
        "does not show here" if found.high < -allowed else verdict,
    )


def robust(study: Study) -> tuple[str, str]:
    """Is the area under OSRM's curve larger than under LoRA's, in every seed?"""
    found = {
        start: {
            seed: area(each["search"]["task_arithmetic"]["grid"], curve["average"])
            for seed, each in study.records.get(start, {}).items()
            if (curve := each["search"].get("task_arithmetic"))
        }
        for start in ("analytical", "gaussian")
    }
    return by_seed(found["analytical"], found["gaussian"])


def grows(study: Study) -> tuple[str, str]:
    """Is OSRM's advantage in the normalised average larger for all tasks than for the fewest?"""
    few = next(iter(QUESTIONS["tasks"]["subsets"]))
    advantage: list[dict[int, float]] = []
    for end in ("", f"+{few}"):
        ours, theirs = (
            study.values(start + end, "task_arithmetic", "normalised_average")
            for start in ("analytical", "gaussian")
        )
        advantage.append({seed: ours[seed] - theirs[seed] for seed in ours.keys() & theirs.keys()})
    return by_seed(*advantage)


def by_seed(first: dict[int, float], second: dict[int, float]) -> tuple[str, str]:
    """The paired differences × 100 of every seed; all of one sign is a verdict."""
    found = [100 * (first[seed] - second[seed]) for seed in sorted(first.keys() & second.keys())]
    if len(found) < 2:
        return MISSING
    text = f"{mean(found):+.1f} (by seed: {', '.join(f'{each:+.1f}' for each in found)})"
    if min(found) > 0:
        return text, "shows here"
    return text, "does not show here" if max(found) < 0 else "undecided here"
