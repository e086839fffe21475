"""Scores of merges, each task with its own head, on its own data; and --diagnose."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from statistics import mean
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from osrm import report
from osrm.adapters import CONFIG, read_adapter
from osrm.backbones import find_backbone, load_tokenizer
from osrm.checkpoints import Checkpoint
from osrm.commands.inputs import Inputs
from osrm.commands.merger import Merger
from osrm.config import MergeConfig, TrainConfig
from osrm.data import Splits, TaskData, fingerprint, load_task, split_task, validation_splits
from osrm.devices import find_device
from osrm.errors import UserError
from osrm.evaluation import Predictions
from osrm.files import write_json, write_text
from osrm.interference import diagnose
from osrm.lending import applied, linear_weight, load_head
from osrm.measure import peak_memory, reset_peak_memory
from osrm.merged import MergedUpdate
from osrm.merging import METHODS, row
from osrm.records import RESULTS, Results, Row, record
from osrm.session import Session
from osrm.task_vectors import LoraPair, deltas, dense
from osrm.texts import open_texts

logger = logging.getLogger(__name__)

RowPredictions = dict[str, dict[str, Predictions]]
"""{row of the table: {task: its predictions}}"""

DIAGNOSED = 100
"""The examples of each task that --diagnose measures on."""


def open_session(
    config: MergeConfig, inputs: Inputs, methods: Iterable[str]
) -> tuple[Session, dict[str, dict[str, Any]]]:
    """Load the tokenizer, and the data of all tasks, and check the data.

    Returns:
        the session, and {task: data and settings of its scores}: the flags, else its args.json
    """
    backbone = find_backbone(inputs.backbone or "")
    if config.eval_text:
        return open_texts(config, backbone, inputs.checkpoints)
    tokenizer = load_tokenizer(backbone)
    fallback = {**vars(TrainConfig()), "data_dir": backbone.data_dir}
    flags = {"data_dir": config.data_dir, "max_test_samples": config.max_test_samples}
    given = {name: value for name, value in flags.items() if value is not None}
    learns = any(METHODS[name].needs for name in methods)
    most = max(config.max_num_samples * learns, config.align_heads or 0)
    data: dict[str, TaskData] = {}
    settings: dict[str, dict[str, Any]] = {}
    for name, checkpoint in inputs.checkpoints.items():
        known = {**fallback, **checkpoint.args, **given}
        fields = ("data_dir", "max_seq_len", "max_test_samples", "seed")
        chosen = {field: known[field] for field in fields}
        only = not (config.search or most)
        loaded = load_task(inputs.tasks[name], chosen["data_dir"], validation_only=only)
        reported = validation_splits(loaded, chosen["max_test_samples"], chosen["seed"])
        chosen |= {"batch_size": config.per_device_eval_bsz, "dtype": config.eval_dtype}
        train = selection = reported[""].head(0)
        if config.search:
            selection = held_out_part(name, checkpoint, loaded)
            chosen["held_out_examples"] = len(selection)
        if learns:
            chosen["statistics_examples"] = config.max_num_samples
        if most:
            train = split_task(loaded, chosen["seed"], max_train=most).train
        data[name], settings[name] = TaskData(train, selection, reported), chosen
    session = Session(
        backbone,
        tokenizer,
        find_device(config.device),
        getattr(torch, config.eval_dtype),
        seed=0,  # of new heads; each task's own replaces them
        batch_size=config.per_device_eval_bsz,
        tasks=inputs.tasks,
        max_seq_len={name: chosen["max_seq_len"] for name, chosen in settings.items()},
        data=data,
    )
    return session, settings


def held_out_part(task: str, checkpoint: Checkpoint, loaded: Splits) -> pd.DataFrame:
    """The examples that selected the run's best epoch: neither trained on nor reported.

    Raises UserError if there are none, or nothing proves that they are the ones.
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


def predict_all(session: Session, merger: Merger) -> RowPredictions:
    """Predict with the base model, each task's own update and every merge, and the task's head.

    One model is in memory at a time; it gets one update after the other.
    """
    predictions: RowPredictions = {n: {} for n in ("pre-trained", "individual", *merger.methods)}
    for name, checkpoint in merger.inputs.checkpoints.items():
        task = session.tasks[name]
        model = session.model(task, checkpoint.head)
        splits = session.encoded_splits(task)
        memory: dict[str, Tensor] = {}
        for line, by_task in predictions.items():
            update: Mapping[str, Tensor] = {}
            if line in merger.methods:
                update = merge = MergedUpdate(merger.directory / line, name, device=session.device)
                if merger.shared.align_heads:
                    load_head(model, merge.head)
            elif line == "individual":
                update = deltas(checkpoint.updates, session.device)
            with applied(model, update, memory):
                by_task[name] = session.predict(model, task, splits, f"{name}: {line}")
        del model, memory  # or they would stay beside the next task's
    return predictions


def score_all(session: Session, merger: Merger, settings: dict[str, dict[str, Any]]) -> None:
    """Score every merge; write results.json, predictions, tables and plots beside them."""
    directory = merger.directory
    reset_peak_memory()
    predictions = predict_all(session, merger)
    peak = peak_memory(session.device.type)
    logger.info("evaluation: peak memory %.2f GiB", peak)
    table = prediction_table(predictions)
    table.to_parquet(directory / "predictions.parquet", compression="zstd")
    for method in merger.methods:
        merger.costs[method]["kept"] = kept(merger, method)
    # The start of A that the runs share names them in the table.
    inits = {run.args.get("init", "adapters") for run in merger.inputs.checkpoints.values()}
    results = Results(
        **vars(merger.shared),
        init=inits.pop() if len(inits) == 1 else "mixed starts",
        rows=rows(predictions, session, merger),
        search=merger.search,
        evaluation=settings,
        evaluation_peak_gib=peak,
    )
    write_json(directory / RESULTS, record(results))
    text = report.score_table([results]) + "\n" + report.cost_table(results)
    write_text(directory / "results.md", text)
    report.frame(results).to_csv(directory / "results.csv", index=False, lineterminator="\r\n")
    report.plot([results], directory / "results.png")
    report.plot_tasks(results, directory / "tasks.png")
    if merger.search:
        report.plot_search(merger.search, results.measure, directory / "search.png")


def rows(predictions: RowPredictions, session: Session, merger: Merger) -> list[Row]:
    """The rows of the table, with the scores that the paper's tables show, and all metrics."""
    metrics = {
        name: {
            task: session.scores(session.tasks[task], splits) for task, splits in by_task.items()
        }
        for name, by_task in predictions.items()
    }
    shown = {
        name: {
            task: values[f"eval_{session.tasks[task].score}"] for task, values in by_task.items()
        }
        for name, by_task in metrics.items()
    }
    own = {task: score for task, score in shown["individual"].items() if score > 0}
    return [
        Row(
            name=name,
            knobs=merger.methods.get(name, {}),
            scores=by_task,
            average=mean(by_task.values()),
            normalised_average=mean(by_task[t] / own[t] for t in own) if own else None,
            metrics=metrics[name],
            **merger.costs.get(name, {}),
        )
        for name, by_task in shown.items()
    ]


def kept(merger: Merger, method: str) -> float:
    """⟨received, own⟩ / ‖own‖² of the tasks' updates, mean over the tasks."""
    vectors, device = merger.inputs.vectors, merger.device
    update = MergedUpdate(merger.directory / method, vectors.tasks[0], device=device)
    products = torch.zeros(2, len(vectors.tasks), dtype=torch.float64, device=device)
    for module, updates in vectors.updates.items():
        part = update.part(module)
        for task, own in enumerate(updates):
            delta = dense(own, device)
            products[0, task] += (row(part, task) * delta).sum(dtype=torch.float64)
            products[1, task] += delta.square().sum(dtype=torch.float64)
    return float((products[0] / products[1]).nanmean())


def prediction_table(predictions: RowPredictions) -> pd.DataFrame:
    """A line for each reported example, a column for each row of the table: for paired tests.

    `split` is the suffix of the metrics, `example` the number in it; regressions have values.
    """
    parts = []
    for task, splits in predictions["individual"].items():
        for suffix, (_, true) in splits.items():
            columns = {"task": task, "split": suffix, "example": range(len(true)), "label": true}
            columns |= {name: by_task[task][suffix][0] for name, by_task in predictions.items()}
            parts.append(pd.DataFrame(columns))
    table = pd.concat(parts, ignore_index=True)
    return table.astype(dict.fromkeys(("label", *predictions), "float32"))


def diagnose_merges(session: Session, merger: Merger) -> None:
    """--diagnose: how far adapters and merges shift each task's outputs, in interference.*.

    Measured on the first reported examples of each task: no start of A depends on them.
    """
    merged, checkpoints = merger.directory, merger.inputs.checkpoints
    model = session.model(session.tasks[next(iter(checkpoints))])
    modules = [name for name, _ in model.named_modules() if name in merger.inputs.vectors]
    settings = {"features": "token", "count_padding": False}
    moments, starts, updates = {}, {}, {}
    for task, checkpoint in checkpoints.items():
        examples = session.data[task].validation[""].head(DIAGNOSED)
        key = session.key(model, session.tasks[task], examples, **settings)
        moments[task] = session.statistics(model, modules, key, examples)
        updates[task] = {name: checkpoint.updates[name] for name in modules}
        if (checkpoint.path / "init_model" / CONFIG).exists():
            before = read_adapter(checkpoint.path / "init_model").updates
            starts[task] = {n: pair.A for n, pair in before.items() if isinstance(pair, LoraPair)}
    diagnosis = diagnose(
        updates,
        moments,
        lambda name: linear_weight(model, name).detach().float(),
        starts=starts,
        merged={m: {t: MergedUpdate(merged / m, t) for t in checkpoints} for m in merger.methods},
    )
    write_json(merged / "interference.json", diagnosis.record())
    write_text(merged / "interference.md", report.diagnosis_tables(diagnosis))
    report.heat_map(diagnosis, merged / "interference.png")
    report.layer_plot(diagnosis, merged / "interference-layers.png")
