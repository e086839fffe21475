"""What the studies ask for: questions.yaml and studies/*.yaml, as runs."""

from __future__ import annotations

from math import sqrt
from pathlib import Path
from statistics import fmean, variance
from typing import Any

import yaml

HERE = Path(__file__).parent
STUDIES: dict[str, dict[str, Any]] = {
    path.stem: yaml.safe_load(path.read_text())
    for path in sorted((HERE / "studies").glob("*.yaml"))
}
SCIENCE = yaml.safe_load((HERE / "questions.yaml").read_text())
STARTS: dict[str, str] = SCIENCE["starts"]
"""{start: train_glue.py's flags}"""
QUESTIONS: dict[str, dict[str, Any]] = SCIENCE["questions"]
KINDS = ("vary", "multiply_lr", "transform", "merge", "subsets")


def variations(kind: str) -> dict[str, Any]:
    """{variation: its flags, factor or number of tasks} of all questions of a kind."""
    return {
        name: value for asked in QUESTIONS.values() for name, value in asked.get(kind, {}).items()
    }


def varied_runs(question: str) -> list[str]:
    """The runs of one question: each start, followed by its variations."""
    asked = QUESTIONS[question]
    (names,) = (asked[kind] for kind in KINDS if kind in asked)
    return [run for start in asked["starts"] for run in (start, *(f"{start}+{n}" for n in names))]


def runs(study: str, question: str | None = None) -> list[str]:
    """The runs of one question of a study, or of all questions, as start[+variation]/seed."""
    setting = STUDIES[study]
    starts = setting.get("starts", [*STARTS])
    if question == "methods":
        return [f"{start}/{seed}" for start in starts for seed in setting["seeds"]]
    if question is None:
        return [run for name in ("methods", *QUESTIONS) for run in runs(study, name)]
    asked, counts = [], QUESTIONS[question].get("subsets", {})
    for run in varied_runs(question):
        start, _, name = run.partition("+")
        known = name in setting.get("variations", [name])
        fits = counts.get(name, 0) < len(setting["tasks"])  # all tasks are the plain run
        if name and start in starts and known and fits:
            asked += [f"{run}/{seed}" for seed in setting["more_seeds"]]
    return asked


def chosen_rates(scores: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """The rate of each start: the smallest whose mean is within one standard error of the best.

    This is the rule of one standard error (Breiman et al., 1984). The seeds are few, so the error
    is pooled over all starts and rates. With one seed it is unknown, and the best rate is taken.

    Args:
        scores: {start: {rate: the selection score of each seed}}, with the same number of seeds.
    """
    cells = [values for rates in scores.values() for values in rates.values()]
    seeds = len(cells[0])
    error = sqrt(fmean(map(variance, cells)) / seeds) if seeds > 1 else 0.0
    chosen = {}
    for start, rates in scores.items():
        means = {rate: fmean(values) for rate, values in rates.items()}
        near = [rate for rate in rates if means[rate] >= max(means.values()) - error]
        chosen[start] = {"lr": min(near, key=float), "standard_error": error, "tried": means}
    return chosen
