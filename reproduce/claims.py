"""The paper's claims and ours, what a study measured, and a verdict on each by a rule."""

from __future__ import annotations

import numpy as np
from intervals import Difference, holm, student
from plan import QUESTIONS
from study import TASKS, Study, area, shared
from tables import CLAIMS, CURVES, Table, curves

PAPER = {
    "task_arithmetic": "RoBERTa-large +6.55 (70.04 → 76.59)",
    "regmean": "T5-large +3.76",
}
"""OSRM minus LoRA in the paper, as third-party notes have it: average of eight tasks × 100."""
HEAD = ["claim", "known of the paper", "measured here", "corrected p", "verdict"]
HEAD += ["least without one task", "without stsb", "without cola", "merging loss"]
MISSING = ["–", "–", "not run yet"]


def claim_table(study: Study) -> Table:
    """A line per claim: the paper's number, ours, the verdict, and what it rests on."""
    lines = [HEAD]
    for pair, claim in CLAIMS.items():
        if not {*pair} <= {*study.starts}:
            continue
        for row in (*PAPER, *(["tsv", "individual"] if "contrastive" in pair else [])):
            known = PAPER[row] if pair == ("analytical", "gaussian") else "–"
            lines.append([f"{claim}, {row}", known, *compared(study, *pair, row)])
    areas = {row: found for row in CURVES if (found := area_difference(study, row))}
    others: dict[tuple[str, str], Difference | None] = {
        ("single-task scores within 1 % of LoRA's", "within 1 %"): relative(study, bound=-1),
        **{
            (f"more robust to λ: a larger area under its curve, {row}", "yes"): found
            for row, found in (dict.fromkeys(CURVES) | holm(areas)).items()
        },
        ("the advantage grows with the number of tasks, a task", "yes"): growth(study),
    }
    size = ["it shrinks with the size of the model", "yes", "one model a study", "–"]
    rest = [[*claim, *judged(found)] for claim, found in others.items()]
    rest.append([*size, "cannot be tested here"])
    return [*lines, *(line + ["–"] * (len(HEAD) - len(line)) for line in rest)]


def judged(difference: Difference | None) -> list[str]:
    """The difference × 100 with its interval, its p, and the verdict."""
    if difference is None:
        return MISSING
    return [str(difference), f"{difference.p:.2g}", difference.verdict]


def compared(study: Study, run: str, other: str, method: str) -> list[str]:
    """What `judged` says of two starts under one method, and what it rests on."""
    rest = {
        task: each[method]
        for task in TASKS
        if method in (each := study.differences(run, other, f"without {task}"))
    }
    least = min(rest, key=lambda task: rest[task].mean, default=None)
    return [
        *judged(study.differences(run, other).get(method)),
        f"{rest[least]} ({least})" if least else "–",
        *(str(rest.get(task, "–")) for task in ("stsb", "cola")),
        str(study.differences(run, other, "loss").get(method, "–")),
    ]


def relative(study: Study, bound: float) -> Difference | None:
    """OSRM's single-task average less LoRA's, in percent of LoRA's, beside a bound."""
    ours, theirs = (study.values(start, "individual") for start in ("analytical", "gaussian"))
    seeds = shared(study.paired("analytical", "gaussian"), ours, theirs)
    return student({seed: ours[seed] / theirs[seed] - 1 for seed in seeds}, bound)


def area_difference(study: Study, method: str) -> Difference | None:
    """OSRM's area under the curve of the held-out average against λ, less LoRA's."""
    ours, theirs = (
        {seed: area(*curve) for seed, curve in curves(study, start, method).items()}
        for start in ("analytical", "gaussian")
    )
    return student({seed: ours[seed] - theirs[seed] for seed in shared(ours, theirs)})


def growth(study: Study) -> Difference | None:
    """The rise of OSRM's advantage in the normalised average with the number of merged tasks.

    The measure is the slope of a line through the advantages of each seed.
    """
    points: dict[int, dict[int, float]] = {}
    for end in ("", *(f"+{name}" for name in QUESTIONS["tasks"]["subsets"])):
        ours, theirs = (
            study.values(start + end, "task_arithmetic", "normalised_average")
            for start in ("analytical", "gaussian")
        )
        for seed in shared(ours, theirs):
            count = len(study.records["analytical" + end][seed]["tasks"])
            points.setdefault(seed, {})[count] = ours[seed] - theirs[seed]
    return student(
        {
            seed: float(np.polyfit([*advantages], [*advantages.values()], 1)[0])
            for seed, advantages in points.items()
            if len(advantages) > 1
        }
    )
