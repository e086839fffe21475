"""Scores of merges: each task with its own head, on data of its own; and the choice of λ."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from datasets import Dataset
from torch import Tensor

from osrm import report
from osrm.adapters import applied, load_head
from osrm.backbones import Backbone, find_backbone, load_model, load_tokenizer
from osrm.checkpoints import Checkpoint, check_fits
from osrm.config import MergeConfig, TrainConfig
from osrm.errors import UserError
from osrm.evaluation import Predictions, predict_splits, scores
from osrm.glue import TASKS, fingerprint, load_task, split_task, tokenize, validation_splits
from osrm.merged import MergedUpdate
from osrm.merging import METHODS, row
from osrm.runs import peak_memory, reset_peak_memory, write_json, write_text
from osrm.task_vectors import TaskVectors, dense

if TYPE_CHECKING:
    from osrm.commands.merge import Inputs, Merger, Search

logger = logging.getLogger(__name__)

RowPredictions = dict[str, dict[str, Predictions]]
"""{row of the table: {task: its predictions}}"""

Splits = dict[str, dict[str, Dataset]]
"""{task: {suffix of the metrics: tokenised examples}}"""


def score_all(
    evaluation: Evaluation,
    merger: Merger,
    methods: Mapping[str, dict[str, Any]],
    search: Mapping[str, Search],
) -> None:
    """Score every merge; write results.json, tables and plots beside them."""
    directory = merger.directory
    reset_peak_memory()
    predictions = evaluate_all(evaluation, merger.inputs, directory, [*methods])
    peak = peak_memory(evaluation.device.type)
    logger.info("evaluation: peak memory %.2f GiB", peak)
    prediction_table(predictions).to_parquet(directory / "predictions.parquet", compression="zstd")
    metrics = {
        row: {task: scores(TASKS[task], found) for task, found in by_task.items()}
        for row, by_task in predictions.items()
    }
    for method in methods:
        merger.costs[method]["kept"] = kept(merger.inputs.vectors, directory / method)
    results = {
        "init": common_init(merger.inputs),
        "backbone": merger.inputs.backbone,
        "rows": report.rows(metrics, methods, merger.costs),
        "search": search,
        "evaluation": evaluation.settings,
        "evaluation_peak_gib": peak,
        **merger.recipe,
    }
    write_json(directory / "results.json", results)
    write_text(
        directory / "results.md", report.table([results]) + "\n" + report.cost_table(results)
    )
    report.write_csv(results, directory / "results.csv")
    report.plot([results], directory / "results.png")
    report.plot_tasks(results, directory / "tasks.png")
    if search:
        report.plot_search(search, directory / "search.png")


def kept(vectors: TaskVectors, merged: Path) -> float:
    """⟨received, own⟩ / ‖own‖² of the tasks' updates, mean over the tasks."""
    saved = MergedUpdate(merged, vectors.tasks[0])
    products = torch.zeros(2, len(vectors.tasks), dtype=torch.float64)
    for module in vectors:
        part = saved.part(module)
        for task, delta in enumerate(vectors[module]):
            products[0, task] += (row(part, task) * delta).sum(dtype=torch.float64)
            products[1, task] += delta.square().sum(dtype=torch.float64)
    return float((products[0] / products[1]).nanmean())


def common_init(inputs: Inputs) -> str:
    """The start of A that the runs had; it names them in the table."""
    inits = {each.args.get("init", "adapters") for each in inputs.checkpoints.values()}
    return inits.pop() if len(inits) == 1 else "mixed starts"


@dataclass(frozen=True)
class Evaluation:
    """All that the scoring needs, loaded and checked before anything is merged."""

    backbone: Backbone
    tokenizer: Any
    settings: dict[str, dict[str, Any]]
    """{task: data and settings}: the flags, else the run's own args.json."""
    reported: Splits
    held_out: Splits
    """What chooses λ; empty without --search."""
    train: dict[str, Dataset]
    """{task: training examples} for RegMean and Fisher; empty without them."""
    count_padding: bool
    dtype: torch.dtype
    """Of the model that is evaluated."""

    @property
    def device(self) -> torch.device:
        """Where models are evaluated."""
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def model(self, task: str) -> Any:
        """The pre-trained model with a new head for the task."""
        labels = TASKS[task].labels
        return load_model(self.backbone, labels, self.tokenizer, self.dtype).to(self.device)

    def predict(self, model: Any, task: str, splits: Splits, title: str) -> Predictions:
        """What a model with the task's head predicts on the task's part of `splits`."""
        batch_size = self.settings[task]["batch_size"]
        return predict_splits(model, TASKS[task], splits[task], self.tokenizer, batch_size, title)


def prepare(config: MergeConfig, inputs: Inputs, methods: Iterable[str]) -> Evaluation:
    """Load tokenizer and data, and see that every update and head fits the base model.

    Raises:
        UserError: no such model or data; an update or head of another model; see `held_out_part`.
    """
    backbone = find_backbone(inputs.backbone or "")
    tokenizer = load_tokenizer(backbone)
    defaults = {each.name: each.default for each in fields(TrainConfig)}
    defaults["data_dir"] = backbone.data_dir
    settings, reported, held_out, train = {}, {}, {}, {}
    trains = any(METHODS[name].needs for name in methods)
    for name, checkpoint in inputs.checkpoints.items():
        names = ("data_dir", "max_seq_len", "max_test_samples", "seed")
        chosen = {each: checkpoint.args.get(each, defaults[each]) for each in names}
        for each in ("data_dir", "max_test_samples"):
            if getattr(config, each) is not None:
                chosen[each] = getattr(config, each)
        settings[name] = {
            **chosen,
            "batch_size": config.per_device_eval_bsz,
            "dtype": config.eval_dtype,
        }
        loaded = load_task(
            TASKS[name], chosen["data_dir"], validation_only=not (config.search or trains)
        )
        splits = validation_splits(loaded, chosen["max_test_samples"], chosen["seed"])
        encode = partial(
            tokenize, task=TASKS[name], tokenizer=tokenizer, max_seq_len=chosen["max_seq_len"]
        )
        reported[name] = {suffix: encode(split) for suffix, split in splits.items()}
        if config.search:
            part = held_out_part(name, checkpoint, loaded)
            settings[name]["held_out_examples"] = len(part)
            held_out[name] = {"": encode(part)}
        if trains:
            settings[name]["statistics_examples"] = config.max_num_samples
            most = config.max_num_samples
            train[name] = encode(split_task(loaded, chosen["seed"], max_train=most).train)
    evaluation = Evaluation(
        *(backbone, tokenizer, settings, reported, held_out, train, config.count_padding),
        getattr(torch, config.eval_dtype),
    )
    for name, checkpoint in inputs.checkpoints.items():
        check_fits(checkpoint, evaluation.model(name))
    return evaluation


def held_out_part(task: str, checkpoint: Checkpoint, loaded: Mapping[str, Dataset]) -> Dataset:
    """The examples that selected the run's best epoch: neither trained on nor reported.

    Raises:
        UserError: there are none, or nothing proves that they are the ones.
    """
    match checkpoint.args:
        case {"select_on": "validation"}:
            why = "it was trained with --select-on validation: what selects is what is reported"
        case {"source": {"held_out": held_out}, "data": {"selection": {"fingerprint": own}}} if (
            held_out != own
        ):
            why = "it was transformed from a run that may have been trained on these examples"
        case {
            "seed": int(seed),
            "max_eval_samples": int(most),
            "data": {"selection": {"fingerprint": str(recorded)}},
        }:
            selection = split_task(loaded, seed, max_selection=most).selection
            if fingerprint(selection) == recorded:
                return selection
            why = "the training data is no longer that of the run, by its args.json"
        case _:
            why = "no args.json of train_glue.py says which examples were held out"
    raise UserError(f"--search, task '{task}': {checkpoint.path}: {why}; give --scale instead")


def search_knobs(
    config: MergeConfig,
    evaluation: Evaluation,
    merger: Merger,
    methods: Mapping[str, dict[str, Any]],
) -> dict[str, Search]:
    """The λ, and density, of each method that has them, by the average score on held-out data.

    Each density is merged once, with λ = 1: updates are linear in λ. `methods` are merged already;
    the directory of one holds its last candidate afterwards.
    """
    grid = sorted(set(config.search))
    best: dict[str, Search] = {}
    densities: list[float] | list[None] = sorted(set(config.search_density)) or [None]
    for density in densities:
        tried: dict[str, dict[str, Any]] = {}
        for name in methods:
            takes = METHODS[name].knobs
            if "scale" in takes and density is not None and "density" in takes:
                tried[name] = {"density": density}
            elif "scale" in takes and name not in best:
                tried[name] = {}
        merger.save({name: {**methods[name], **knobs} for name, knobs in tried.items() if knobs})
        scores = {
            task: held_out_scores(
                evaluation, task, checkpoint.head, merger.directory, [*tried], grid
            )
            for task, checkpoint in merger.inputs.checkpoints.items()
        }
        for name, knobs in tried.items():
            found = choose_scale(grid, {task: each[name] for task, each in scores.items()})
            found["knobs"] = knobs
            if name not in best or max(found["average"]) > max(best[name]["average"]):
                best[name] = found
    for name, found in best.items():
        logger.info("%s: λ = %g is the best of %s on held-out data", name, found["best"], grid)
    return best


def held_out_scores(
    evaluation: Evaluation,
    task: str,
    head: Mapping[str, Tensor],
    merged: Path,
    methods: list[str],
    grid: list[float],
) -> dict[str, list[float]]:
    """{method: one task's score with each λ}; one model is lent all the updates."""
    model = evaluation.model(task)
    load_head(model, head)
    found: dict[str, list[float]] = {method: [] for method in methods}
    memory: dict[str, Tensor] = {}
    for method in methods:
        for scale in grid:
            with applied(model, MergedUpdate(merged / method, task, scale), memory):
                title = f"{task}: {method}, λ = {scale:g}"
                predictions = evaluation.predict(model, task, evaluation.held_out, title)
            metrics = scores(TASKS[task], predictions)
            found[method].append(metrics[f"eval_{TASKS[task].score}"])
    return found


def choose_scale(grid: list[float], scores: dict[str, list[float]]) -> Search:
    """The λ with the best average over the tasks, the smallest of those."""
    average = [mean(each) for each in zip(*scores.values())]
    # Rounded: averages that are equal as fractions may differ in their last bit.
    _, best = max(zip(average, grid), key=lambda each: (round(each[0], 12), -each[1]))
    return {
        "chosen_on": "held-out data",
        "grid": grid,
        "scores": scores,
        "average": average,
        "best": best,
    }


def evaluate_all(
    evaluation: Evaluation, inputs: Inputs, merged: Path, methods: list[str]
) -> RowPredictions:
    """Predict with the pre-trained body, each task's own update and every merge, and its head.

    One model is in memory at a time, and lent one update after the other.
    """
    found: RowPredictions = {name: {} for name in ("pre-trained", "individual", *methods)}
    for name, checkpoint in inputs.checkpoints.items():
        model = evaluation.model(name)
        load_head(model, checkpoint.head)
        own = {module: dense(update) for module, update in checkpoint.updates.items()}
        memory: dict[str, Tensor] = {}
        for line in found:
            update: Mapping[str, Tensor]
            if line in methods:
                update = MergedUpdate(merged / line, name)
            else:
                update = own if line == "individual" else {}
            with applied(model, update, memory):
                found[line][name] = evaluation.predict(
                    model, name, evaluation.reported, f"{name}: {line}"
                )
        del model, own, memory  # or they would lie beside the next ones
    return found


def prediction_table(predictions: RowPredictions) -> pd.DataFrame:
    """A line for each reported example, a column for each row of the table: for paired tests.

    `split` is the suffix of the metrics, `example` the number in it; regressions have values.
    """
    parts = []
    for task, splits in predictions["individual"].items():
        for suffix, (_, true) in splits.items():
            columns = {"task": task, "split": suffix, "example": range(len(true)), "label": true}
            columns |= {row: by_task[task][suffix][0] for row, by_task in predictions.items()}
            parts.append(pd.DataFrame(columns))
    table = pd.concat(parts, ignore_index=True)
    return table.astype(dict.fromkeys(("label", *predictions), "float32"))
