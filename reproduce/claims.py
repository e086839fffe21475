"""The paper's claims and ours, what a study measured, and a verdict on each by a rule."""

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
"""OSRM minus LoRA in the paper, as third-party notes have it: average of eight tasks × 100."""


def claim_table(study: Study) -> Table:
    """A line per claim: the paper's number, ours, the verdict."""
    lines = [["claim", "known of the paper", "measured here", "verdict"]]
    methods = [row for row in study.rows if row not in ("pre-trained", "individual")]
    for method in dict.fromkeys([*PAPER, *methods]):
        cells = judged(study.difference("analytical", "gaussian", method))
        lines.append([f"OSRM's start beats LoRA's, {method}", PAPER.get(method, "–"), *cells])
    lines += [
        ["single-task scores within 1 % of LoRA's", "within 1 %", *kept_within(study, 1.0)],
        *(
            [f"more robust to λ: a larger area under its curve, {method}", "yes", measured, verdict]
            for method in METHODS[:2]
            for measured, verdict in [robust(study, method)]
        ),
        ["the advantage grows with the number of tasks, a task", "yes", *grows(study)],
        ["it shrinks with the size of the model", "yes", "one model a study", UNTESTABLE],
    ]
    for claim, pair in CONTROLS.items():
        cells = judged(study.difference(*pair, "task_arithmetic"))
        lines.append([f"{claim}, task_arithmetic", "–", *cells])
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
    """Whether OSRM's single-task scores are at most `share` % below LoRA's."""
    difference = study.difference("analytical", "gaussian", "individual", relative=True)
    return (f"{difference} %", difference.above(-share)) if difference else MISSING


def robust(study: Study, method: str) -> tuple[str, str]:
    """Whether the curve of the held-out average against λ has a larger area with OSRM."""
    ours, theirs = (
        {seed: area(*curve) for seed, curve in curves(study, start, method).items()}
        for start in ("analytical", "gaussian")
    )
    return judged(over_seeds({seed: ours[seed] - theirs[seed] for seed in shared(ours, theirs)}))


def grows(study: Study) -> tuple[str, str]:
    """Whether OSRM's advantage in the normalised average rises with the number of merged tasks.

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
    return judged(
        over_seeds(
            {
                seed: float(np.polyfit([*advantages], [*advantages.values()], 1)[0])
                for seed, advantages in points.items()
                if len(advantages) > 1
            }
        )
    )


def shared(first: Iterable[int], second: Iterable[int]) -> list[int]:
    """The seeds that both have."""
    return sorted({*first} & {*second})
