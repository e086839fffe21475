"""Journey 3: stack the updates, merge them, score every task, print the table."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from osrm import report
from osrm.adapters import applied, load_head
from osrm.backbones import Backbone, find_backbone, load_model, load_tokenizer
from osrm.checkpoints import (
    Checkpoint,
    check_fits,
    check_task,
    checksum,
    named_directories,
    read_checkpoint,
)
from osrm.config import MergeConfig, TrainConfig, read_json
from osrm.errors import UserError
from osrm.evaluation import evaluate
from osrm.glue import TASKS, find_tasks, load_task, tokenize, validation_splits
from osrm.merged import RECIPE, MergedUpdate, save_merged
from osrm.merging import METHODS, check_knobs, merge
from osrm.runs import check_output, environment, staged, write_json, write_text
from osrm.task_vectors import TaskVectors, dense

logger = logging.getLogger(__name__)

Scores = dict[str, dict[str, dict[str, float]]]
"""{row of the table: {task: {metric: value}}}"""


@dataclass(frozen=True)
class Inputs:
    """What is merged: one checkpoint a task, all of one base model."""

    checkpoints: dict[str, Checkpoint]
    labels: dict[str, tuple[str, ...]]
    backbone: str | None
    """None where nothing says what the base is called; only --no-eval can do with that."""


def run(config: MergeConfig) -> None:
    """Run merge.py: read, stack, merge and save with each method, evaluate, print."""
    methods = choose_methods(config)
    directory = Path(config.output_dir)
    check_replaceable(directory, config.overwrite)
    inputs = read_inputs(config)
    vectors = TaskVectors.stack({task: each.updates for task, each in inputs.checkpoints.items()})
    evaluation = None if config.no_eval else prepare(config, inputs)
    heads = {task: each.head for task, each in inputs.checkpoints.items()}
    recipe = base_recipe(inputs)
    with staged(directory) as staging:
        seconds = {}
        for name, knobs in methods.items():
            begin = time.perf_counter()
            whole = {"method": name, "paper": METHODS[name].paper, "knobs": knobs, **recipe}
            save_merged(staging / name, merge(name, vectors, **knobs), heads, whole)
            seconds[name] = time.perf_counter() - begin
            logger.info("%s: %d tasks merged in %.1f s", name, len(heads), seconds[name])
        if evaluation:
            scores = evaluate_all(evaluation, inputs, staging, [*methods])
            results = {
                "init": common_init(inputs),
                "backbone": inputs.backbone,
                "rows": report.rows(scores, methods, seconds),
                "evaluation": evaluation.settings,
                **recipe,
            }
            write_json(staging / "results.json", results)
            write_text(staging / "results.md", report.table([results]))
            report.plot([results], staging / "results.png")
    if evaluation:
        print((directory / "results.md").read_text(encoding="utf-8"))
    logger.info("The merged models%s are in %s", " and scores" if evaluation else "", directory)


def check_replaceable(directory: Path, overwrite: bool) -> None:
    """Refuse an output directory that is in the way; only an earlier merge is ever replaced."""
    check_output(directory)
    if not directory.exists():
        return
    if not overwrite:
        raise UserError(f"--output-dir {directory} exists; choose another, or add --overwrite")
    ours = {"results.json", "results.md", "results.png"}
    foreign = [
        path.name
        for path in directory.iterdir()
        if path.name not in ours and not (path / RECIPE).exists()
    ]
    if foreign:
        raise UserError(
            f"--output-dir {directory}: --overwrite replaces earlier merges alone, and"
            f" '{foreign[0]}' in it is none; choose another directory"
        )


def choose_methods(config: MergeConfig) -> dict[str, dict[str, Any]]:
    """{method: knobs} from --hparams, --methods, --scale and --density, all checked."""
    table = read_json(config.hparams, "--hparams")
    if not isinstance(table, dict) or not all(isinstance(knobs, dict) for knobs in table.values()):
        raise UserError(f"--hparams {config.hparams}: expected {{method: {{knob: value}}}}")
    flags = {"scale": config.scale, "density": config.density}
    methods = {}
    problems = []
    if not (config.methods or table):
        problems.append("no method; name one")
    for name in config.methods or table:
        takes = METHODS[name].knobs if name in METHODS else ()
        given = {knob: flags[knob] for knob in takes if flags.get(knob) is not None}
        methods[name] = {**table.get(name, {}), **given}
        try:
            check_knobs(name, methods[name])
        except UserError as error:
            problems.append(str(error))
    for knob, value in flags.items():
        if value is not None and methods and not any(knob in each for each in methods.values()):
            problems.append(f"--{knob} {value:g}: none of {', '.join(methods)} has it")
    if problems:
        raise UserError(f"--methods, --hparams {config.hparams}: {'; '.join(problems)}")
    return methods


def read_inputs(config: MergeConfig) -> Inputs:
    """Read and compare the checkpoints of --load-model-path.

    Raises:
        UserError: see `named_directories` and `read_checkpoint`; checkpoints of different bases;
            task names that are not GLUE's, unless --no-eval; a head that does not fit the task.
    """
    where = f"--load-model-path {config.load_model_path}"
    directories = named_directories(config.load_model_path, None)
    if not config.no_eval:
        find_tasks(directories, where)
    odd = [task for task in directories if not re.fullmatch(r"\w[\w.-]*", task)]
    if odd:
        raise UserError(f"{where}: task names have letters, digits, '_', '-', '.' only; not {odd}")

    @cache
    def load_base(name: str) -> Any:
        backbone = find_backbone(name)
        return load_model(backbone, (), load_tokenizer(backbone), torch.float32)

    def base_of(name: str | None) -> Any:
        name = config.backbone or name
        if name is None:
            raise UserError(f"{where}: a dense checkpoint without args.json needs --backbone")
        return load_base(name)

    checkpoints = {task: read_checkpoint(path, base_of) for task, path in directories.items()}
    if not config.no_eval:
        for task, checkpoint in checkpoints.items():
            check_task(checkpoint, task)
    check_bases(checkpoints)
    labels = {task: head_labels(task, each, config) for task, each in checkpoints.items()}
    named = (each.args.get("backbone") or each.base for each in checkpoints.values())
    backbone = config.backbone or next((name for name in named if name), None)
    if backbone is None and not config.no_eval:
        raise UserError(f"{where}: nothing says what the base model is; add --backbone")
    return Inputs(checkpoints, labels, backbone)


def check_bases(checkpoints: Mapping[str, Checkpoint]) -> None:
    """Refuse updates of different pre-trained models: they cannot be added."""
    names = {task: each.base for task, each in checkpoints.items()}
    prints = {task: each.args.get("body_fingerprint") for task, each in checkpoints.items()}
    # A path says less than the weights themselves, which may lie elsewhere on another machine.
    known = prints if all(prints.values()) else names
    different = {base: task for task, base in known.items() if base}
    if len(different) > 1:
        first, second, *_ = different.values()
        raise UserError(
            f"tasks '{first}' and '{second}' have different base models ({names[first]},"
            f" {names[second]}); only updates of one base can be merged"
        )


def head_labels(task: str, checkpoint: Checkpoint, config: MergeConfig) -> tuple[str, ...]:
    """The classes of a task: GLUE's, or as many as its head has outputs; none: a regression.

    Raises:
        UserError: the task is to be evaluated and has no such head.
    """
    outputs = min((len(each) for each in checkpoint.head.values() if each.ndim == 2), default=0)
    if task in TASKS and outputs == TASKS[task].num_labels:
        return TASKS[task].labels
    if not config.no_eval:
        found = f"its head has {outputs} outputs" if outputs else "it has no trained head"
        raise UserError(
            f"{checkpoint.path}: {found}, {task} needs {TASKS[task].num_labels}; train the head"
            " too (PEFT: modules_to_save), or merge with --no-eval"
        )
    return tuple(f"LABEL_{i}" for i in range(outputs)) if outputs != 1 else ()


def base_recipe(inputs: Inputs) -> dict[str, Any]:
    """What all methods' recipes share: the inputs with checksums, and the versions."""
    return {
        "backbone": inputs.backbone,
        "tasks": {
            task: {
                "path": str(each.path),
                "sha256": checksum(each.path),
                "labels": inputs.labels[task],
            }
            for task, each in inputs.checkpoints.items()
        },
        "environment": environment(),
    }


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
    data: dict[str, dict[str, Dataset]]
    """{task: {suffix of the metrics: tokenised validation split}}"""

    def model(self, task: str) -> Any:
        """The pre-trained model with a new head for the task."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        labels = TASKS[task].labels
        return load_model(self.backbone, labels, self.tokenizer, torch.float32).to(device)


def prepare(config: MergeConfig, inputs: Inputs) -> Evaluation:
    """Load tokenizer and data, and see that every update and head fits the base model.

    Raises:
        UserError: no such model or data; an update or head of another model.
    """
    backbone = find_backbone(inputs.backbone or "")
    tokenizer = load_tokenizer(backbone)
    defaults = {each.name: each.default for each in fields(TrainConfig)}
    defaults["data_dir"] = backbone.data_dir
    settings, data = {}, {}
    for name, checkpoint in inputs.checkpoints.items():
        names = ("data_dir", "max_seq_len", "max_test_samples", "seed")
        chosen = {each: checkpoint.args.get(each, defaults[each]) for each in names}
        for each in ("data_dir", "max_test_samples"):
            if getattr(config, each) is not None:
                chosen[each] = getattr(config, each)
        settings[name] = {**chosen, "batch_size": config.per_device_eval_bsz}
        task = TASKS[name]
        loaded = load_task(task, chosen["data_dir"], validation_only=True)
        splits = validation_splits(loaded, chosen["max_test_samples"], chosen["seed"])
        data[name] = {
            suffix: tokenize(split, task, tokenizer, chosen["max_seq_len"])
            for suffix, split in splits.items()
        }
    evaluation = Evaluation(backbone, tokenizer, settings, data)
    for name, checkpoint in inputs.checkpoints.items():
        check_fits(checkpoint, evaluation.model(name))
    return evaluation


def evaluate_all(
    evaluation: Evaluation, inputs: Inputs, merged: Path, methods: list[str]
) -> Scores:
    """Score the pre-trained body, each task's own update and every merge, with the task's head.

    One model is in memory at a time, and lent one update after the other.
    """
    scores: Scores = {name: {} for name in ("pre-trained", "individual", *methods)}
    for name, checkpoint in inputs.checkpoints.items():
        model = evaluation.model(name)
        load_head(model, checkpoint.head)
        own = {module: dense(update) for module, update in checkpoint.updates.items()}
        for row in scores:
            update: Mapping[str, Tensor]
            if row in methods:
                update = MergedUpdate(merged / row, name)
            else:
                update = own if row == "individual" else {}
            with applied(model, update):
                scores[row][name] = evaluate(
                    model,
                    TASKS[name],
                    evaluation.data[name],
                    evaluation.tokenizer,
                    evaluation.settings[name]["batch_size"],
                    f"{name}: {row}",
                )
    return scores
