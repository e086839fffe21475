"""How fast T tasks are scored with L values of λ: one model that is lent every update, or reloads.

    python benchmarks/evaluation.py --output benchmarks/results/evaluation.json

`merge.py --search` loads a task's model once and lends it one update after the other, in place.
The peer is the same code, given one λ at a time: it loads the model for each. Both get the same
merge (task arithmetic of random adapters), heads and real sentences, and take turns. The benchmark
stops unless their scores are the same, and every weight that was lent an update ends as it began.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from counting import CONFIGS, pretrained, random_updates

from osrm.adapters import linear_weight
from osrm.backbones import find_backbone, head_names, load_tokenizer, projections
from osrm.commands.scoring import Evaluation, held_out_scores
from osrm.glue import TASKS, load_task, tokenize
from osrm.merged import MergedUpdate, save_merged
from osrm.merging import METHODS, merge
from osrm.runs import environment, write_json

METHOD, RANK = "task_arithmetic", 8


@dataclass(frozen=True)
class Timed(Evaluation):
    """Notes how long each prediction took, and the models."""

    predicting: list[float]
    models: list[Any]

    def model(self, task: str) -> Any:
        """The pre-trained model, of which the last one is kept."""
        self.models[:] = [super().model(task)]
        return self.models[0]

    def predict(self, *args: Any) -> Any:
        """What a model predicts."""
        begin = time.perf_counter()
        found = super().predict(*args)
        self.predicting.append(time.perf_counter() - begin)
        return found


def prepare(name: str, tasks: list[str], examples: int, folder: Path) -> Timed:
    """The model, in `folder` if its weights are random, and `examples` sentences of each task."""
    backbone = find_backbone("minilm")
    tokenizer = load_tokenizer(backbone)
    if name != "minilm":
        torch.manual_seed(0)
        pretrained(CONFIGS[name], torch.float32, "cpu").base_model.save_pretrained(folder / name)
        backbone = find_backbone(str(folder / name))
        tokenizer.model_input_names = ["input_ids", "attention_mask"]  # RoBERTa has one token type
    splits = {}
    for task in tasks:
        part = load_task(TASKS[task], "mini-glue", validation_only=True)["validation"]
        encoded = tokenize(part.select(range(examples)), TASKS[task], tokenizer, 128)
        splits[task] = {"": encoded}
    settings: dict[str, dict[str, Any]] = {task: {"batch_size": 64} for task in tasks}
    rest = ({}, splits, {}, False, torch.float32)
    return Timed(backbone, tokenizer, settings, *rest, [], [])


def random_merge(evaluation: Timed, tasks: list[str], folder: Path) -> None:
    """The merge of a random adapter of each task, as merge.py leaves it."""
    model = evaluation.model(tasks[0])
    shapes = {each: linear_weight(model, each).shape for each in projections(model, "qv", RANK)}
    vectors = random_updates(shapes, RANK, tasks)
    recipe = {
        "method": METHOD,
        "paper": METHODS[METHOD].paper,
        "base": evaluation.backbone.path,
        "knobs": {},
        "tasks": {task: {"path": "random", "labels": TASKS[task].labels} for task in tasks},
    }
    save_merged(folder / METHOD, merge(METHOD, vectors, scale=1.0), {}, recipe)


def random_head(evaluation: Timed, task: str) -> dict[str, torch.Tensor]:
    """A new head, which stands for a trained one."""
    torch.manual_seed(0)
    model = evaluation.model(task)
    tops = tuple(f"{each}." for each in head_names(model))
    return {key: each.clone() for key, each in model.state_dict().items() if key.startswith(tops)}


def check_restored(evaluation: Timed, task: str, merged: Path) -> None:
    """Stop unless the model that was lent every update is as it was loaded, bit for bit."""
    (lent,) = evaluation.models
    fresh = evaluation.model(task)
    for name in MergedUpdate(merged / METHOD, task):
        if not torch.equal(linear_weight(lent, name), linear_weight(fresh, name)):
            raise SystemExit(f"{task}: {name} is not as it was")


def compare(
    name: str, tasks: list[str], grid: list[float], examples: int, repeats: int
) -> dict[str, list[dict[str, float]]]:
    """{way: the seconds of each repeat, in all and in predictions} for T tasks and L values."""
    found: dict[str, list[dict[str, float]]] = {"in place": [], "reloaded": []}
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        evaluation = prepare(name, tasks, examples, folder)
        random_merge(evaluation, tasks, folder)
        heads = {task: random_head(evaluation, task) for task in tasks}

        def score(task: str, values: list[float]) -> list[float]:
            parts = (evaluation, task, heads[task], folder, [METHOD], values)
            return held_out_scores(*parts)[METHOD]

        ways: dict[str, Callable[[str], list[float]]] = {
            "in place": lambda task: score(task, grid),
            "reloaded": lambda task: [each for value in grid for each in score(task, [value])],
        }
        score(tasks[0], grid[:1])  # what libraries do once
        for _ in range(repeats):
            scores = {}
            for way, run in ways.items():
                evaluation.predicting.clear()
                seconds = 0.0
                for task in tasks:
                    begin = time.perf_counter()
                    scores[way, task] = run(task)
                    seconds += time.perf_counter() - begin
                    check_restored(evaluation, task, folder)
                found[way].append({"all": seconds, "predictions": sum(evaluation.predicting)})
            if any(scores["in place", task] != scores["reloaded", task] for task in tasks):
                raise SystemExit("the two ways have different scores")
    return found


def table(cases: list[dict[str, Any]]) -> str:
    """Medians for one update, in milliseconds, and their ratios."""
    lines = [
        "| model | tasks × λ | examples | switch in place, ms | reload, ms | ratio"
        " | predictions, ms | in place, all, ms | reloaded, all, ms | ratio |",
        "| --- |" + " ---: |" * 9,
    ]
    for case in cases:
        points = len(case["tasks"]) * len(case["grid"])
        ms = {
            (way, what): 1000 / points * median(of(each, what) for each in case["seconds"][way])
            for way in case["seconds"]
            for what in ("switch", "predictions", "all")
        }
        place, load = ms["in place", "switch"], ms["reloaded", "switch"]
        all_place, all_load = ms["in place", "all"], ms["reloaded", "all"]
        lines.append(
            f"| {case['model']} | {len(case['tasks'])} × {len(case['grid'])} | {case['examples']}"
            f" | {place:.0f} | {load:.0f} | {load / place:.1f}"
            f" | {ms['in place', 'predictions']:.0f} | {all_place:.0f} | {all_load:.0f}"
            f" | {all_load / all_place:.1f} |"
        )
    return "\n".join(lines)


def of(seconds: dict[str, float], what: str) -> float:
    """The seconds in all, in predictions, or in what is beside them: the switch of updates."""
    return seconds["all"] - seconds["predictions"] if what == "switch" else seconds[what]


def main(argv: list[str] | None = None) -> None:
    """Run what the flags say, print the table, write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["minilm", "roberta-large"])
    parser.add_argument("--tasks", nargs="+", default=["mrpc", "sst2", "mnli", "cola"])
    tenths = [tenth / 10 for tenth in range(1, 11)]
    parser.add_argument("--grid", nargs="+", type=float, default=tenths, help="values of λ")
    parser.add_argument("--examples", type=int, default=8, help="of each task")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each way")
    parser.add_argument("--output", type=Path, help="a JSON file for all numbers")
    args = parser.parse_args(argv)
    cases = []
    for name in args.models:
        seconds = compare(name, args.tasks, args.grid, args.examples, args.repeats)
        setting = {"tasks": args.tasks, "grid": args.grid, "examples": args.examples}
        cases.append({"model": name, **setting, "seconds": seconds})
    print(table(cases))
    if args.output:
        write_json(args.output, {"cases": cases, "environment": environment()})


if __name__ == "__main__":
    main()
