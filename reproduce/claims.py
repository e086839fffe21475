"""The paper's claims and ours, beside what a study measured, and a verdict by rule on each."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from plan import QUESTIONS
from study import Difference, Study, area, over_seeds
from tables import METHODS, PAIRS, Table, curves

PAPER = {
    "task_arithmetic": "RoBERTa-large +6.55 (70.04 → 76.59)",
    "regmean": "T5-large +3.76",
}
"""What is known of OSRM minus LoRA, from third-party notes: the average of eight tasks × 100."""


def claim_table(study: Study) -> Table:
    """The paper's claims and ours beside what was measured, and whether they show."""
    lines = [["claim", "known of the paper", "measured here", "verdict"]]
    methods = [row for row in study.rows if row not in ("pre-trained", "individual")]
    for method in dict.fromkeys([*PAPER, *methods]):
        found = judged(study.difference("analytical", "gaussian", method))
        lines.append([f"OSRM's start beats LoRA's, {method}", PAPER.get(method, "–"), *found])
    lines += [
        ["single-task scores within 1 % of LoRA's", "within 1 %", *kept_within(study, 1.0)],
        *(
            [f"more robust to λ: a larger area under its curve, {method}", "yes", *found]
            for method in METHODS[:2]
            for found in [robust(study, method)]
        ),
        ["the advantage grows with the number of tasks, a task", "yes", *grows(study)],
        ["it shrinks with the size of the model", "yes", "one model a study", UNTESTABLE],
    ]
    for claim, pair in CONTROLS.items():
        found = judged(study.difference(*pair, "task_arithmetic"))
        lines.append([f"{claim}, task_arithmetic", "–", *found])
    return lines


UNTESTABLE = "cannot be tested here"
CONTROLS = {
    "the directions are the reason, not the norm: OSRM beats LoRA at norm 1": PAIRS[1],
    "the directions are the reason: OSRM beats random frames": PAIRS[2],
    "the closed form is worth it: OSRM beats the release's code": PAIRS[3],
    "the contrastive start (ours) beats LoRA's": PAIRS[4],
    "the contrastive start (ours) beats random frames": PAIRS[5],
    "the contrastive start (ours) beats OSRM's": PAIRS[6],
}
MISSING = ("–", "not run yet")


def judged(difference: Difference | None) -> tuple[str, str]:
    """The difference × 100 with its interval, and the verdict."""
    return (str(difference), difference.verdict) if difference else MISSING


def kept_within(study: Study, share: float) -> tuple[str, str]:
    """Are OSRM's single-task scores at most `share` % below LoRA's?"""
    found = study.difference("analytical", "gaussian", "individual", relative=True)
    return (f"{found} %", found.above(-share)) if found else MISSING


def robust(study: Study, method: str) -> tuple[str, str]:
    """Is the area under OSRM's curve of the held-out average against λ larger than LoRA's?"""
    ours, theirs = (
        {seed: area(*curve) for seed, curve in curves(study, start, method).items()}
        for start in ("analytical", "gaussian")
    )
    return judged(over_seeds({seed: ours[seed] - theirs[seed] for seed in shared(ours, theirs)}))


def grows(study: Study) -> tuple[str, str]:
    """Does OSRM's advantage in the normalised average rise with the number of merged tasks?

    Measured as the slope of a line through the advantages of each seed.
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
    return judged(
        over_seeds(
            {
                seed: float(np.polyfit([*found], [*found.values()], 1)[0])
                for seed, found in points.items()
                if len(found) > 1
            }
        )
    )


def shared(first: Iterable[int], second: Iterable[int]) -> list[int]:
    """The seeds of both."""
    return sorted({*first} & {*second})
