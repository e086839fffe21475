"""How fast T tasks are scored with L values of λ: one model for all of them, or a reload for each.

    python benchmarks/evaluation.py --output benchmarks/results/evaluation.json

`merge.py --search` loads a task's model once and applies one update after the other in place. The
peer is the same code with one λ at a time: it loads the model for each. Both get the same merge
(task arithmetic of random adapters), heads and real sentences, and take turns. The benchmark stops
if their scores differ, or if a weight is not restored bit for bit.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from common import flags, measured, parse, report, roberta_config, table
from merging import ours, write_adapters
from transformers import RobertaModel

from osrm.backbones import find_backbone, head_names, load_tokenizer, projections
from osrm.commands.merger import held_out_scores
from osrm.data import TaskData, load_task
from osrm.glue import TASKS
from osrm.lending import linear_weight
from osrm.merged import MergedUpdate
from osrm.session import Session

METHOD, RANK = "task_arithmetic", 8


@dataclass(frozen=True)
class Timed(Session):
    """Notes how long each prediction took, and the last model."""

    predicting: list[float]
    models: list[Any]

    def model(self, *args: Any) -> Any:
        """The pre-trained model."""
        self.models[:] = [super().model(*args)]
        return self.models[0]

    def predict(self, *args: Any) -> Any:
        """What a model predicts."""
        with measured() as cost:
            predictions = super().predict(*args)
        self.predicting.append(cost.seconds)
        return predictions


def prepare(name: str, tasks: list[str], examples: int, folder: Path) -> Timed:
    """The model, in `folder` if its weights are random, and `examples` sentences of each task."""
    backbone = find_backbone("minilm")
    tokenizer = load_tokenizer(backbone)
    if name != "minilm":
        torch.manual_seed(0)
        RobertaModel(roberta_config(), add_pooling_layer=False).save_pretrained(folder / name)
        backbone = find_backbone(str(folder / name))
        tokenizer.model_input_names = ["input_ids", "attention_mask"]  # RoBERTa has one token type
    data = {}
    for task in tasks:
        part = load_task(TASKS[task], "mini-glue", validation_only=True)["validation"]
        part = part.head(examples)
        data[task] = TaskData(part, part, {"": part})
    return Timed(
        *(backbone, tokenizer, torch.device("cpu"), torch.float32),
        seed=0,
        batch_size=64,
        tasks=TASKS,
        max_seq_len=dict.fromkeys(tasks, 128),
        data=data,
        predicting=[],
        models=[],
    )


def random_merge(session: Timed, tasks: list[str], folder: Path) -> Path:
    """The merge of random adapters, as merge.py writes it."""
    model = session.model(TASKS[tasks[0]])
    modules = projections(model, "qv", RANK)
    write_adapters({name: linear_weight(model, name).shape for name in modules}, RANK, folder)
    ours(METHOD, folder, folder / "merged")
    return folder / "merged"


def random_head(session: Timed, task: str) -> dict[str, torch.Tensor]:
    """A new head, which stands for a trained one."""
    torch.manual_seed(0)
    model = session.model(TASKS[task])
    heads = tuple(f"{name}." for name in head_names(model))
    state = model.state_dict()
    return {key: tensor.clone() for key, tensor in state.items() if key.startswith(heads)}


def check_restored(session: Timed, task: str, merged: Path) -> None:
    """Stop unless the model that was lent every update is as it was loaded, bit for bit."""
    (lent,) = session.models
    fresh = session.model(TASKS[task])
    for name in MergedUpdate(merged / METHOD, task):
        if not torch.equal(linear_weight(lent, name), linear_weight(fresh, name)):
            raise SystemExit(f"{task}: {name} is not as it was")


def compare(
    name: str, tasks: list[str], grid: list[float], examples: int, repeats: int
) -> dict[str, list[dict[str, float]]]:
    """{way: the seconds of each repeat, in all and in predictions} for T tasks and L values."""
    seconds: dict[str, list[dict[str, float]]] = {"in place": [], "reloaded": []}
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        session = prepare(name, tasks, examples, folder)
        merged = random_merge(session, tasks, folder)
        heads = {task: random_head(session, task) for task in tasks}

        def score(task: str, values: list[float]) -> list[float]:
            wanted = {METHOD: values}
            scores = held_out_scores(session, task, heads[task], merged=merged, wanted=wanted)
            return [scores[METHOD][value] for value in values]

        ways: dict[str, Callable[[str], list[float]]] = {
            "in place": lambda task: score(task, grid),
            "reloaded": lambda task: [score(task, [value])[0] for value in grid],
        }
        score(tasks[0], grid[:1])  # what libraries do once
        for _ in range(repeats):
            scores = {}
            for way, run in ways.items():
                session.predicting.clear()
                whole = 0.0
                for task in tasks:
                    with measured() as cost:
                        scores[way, task] = run(task)
                    whole += cost.seconds
                    check_restored(session, task, merged)
                seconds[way].append({"all": whole, "predictions": sum(session.predicting)})
            if any(scores["in place", task] != scores["reloaded", task] for task in tasks):
                raise SystemExit("the two ways have different scores")
    return seconds


COLUMNS = {
    "model": "{model}",
    "tasks × λ": "{tasks} × {grid}",
    "examples": "{examples}",
    "switch in place, ms": "{place[switch]:.0f}",
    "reload, ms": "{load[switch]:.0f}",
    "ratio": "{ratio[switch]:.1f}",
    "predictions, ms": "{place[predictions]:.0f}",
    "in place, all, ms": "{place[all]:.0f}",
    "reloaded, all, ms": "{load[all]:.0f}",
    "ratio of all": "{ratio[all]:.1f}",
}


def rows(cases: Sequence[dict[str, Any]]) -> str:
    """Medians for one update, in milliseconds, and their ratios.

    The switch from one update to the next is all that is not prediction.
    """
    records = []
    for case in cases:
        sizes = {"tasks": len(case["tasks"]), "grid": len(case["grid"])}
        place, load = (
            pd.DataFrame(case["seconds"][way])
            .assign(switch=lambda seconds: seconds["all"] - seconds["predictions"])
            .median()
            * (1000 / sizes["tasks"] / sizes["grid"])
            for way in ("in place", "reloaded")
        )
        records.append({**case, **sizes, "place": place, "load": load, "ratio": load / place})
    return table(COLUMNS, records)


def main(argv: Sequence[str] | None = None) -> None:
    """Run what the flags say, print the table, write the JSON."""
    parser = flags(__doc__)
    models = ["minilm", "roberta-large"]
    parser.add_argument("--models", nargs="+", choices=models, default=models)
    parser.add_argument("--tasks", nargs="+", default=["mrpc", "sst2", "mnli", "cola"])
    tenths = [tenth / 10 for tenth in range(1, 11)]
    parser.add_argument("--grid", nargs="+", type=float, default=tenths, help="values of λ")
    parser.add_argument("--examples", type=int, default=8, help="of each task")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each way")
    args = parse(parser, argv)
    cases = []
    for name in args.models:
        seconds = compare(name, args.tasks, args.grid, args.examples, args.repeats)
        setting = {"tasks": args.tasks, "grid": args.grid, "examples": args.examples}
        cases.append({"model": name, **setting, "seconds": seconds})
    report(args, rows(cases), {"cases": cases})


if __name__ == "__main__":
    main()
