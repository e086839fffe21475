"""What merge.py merges, the checkpoints of all tasks, and with which methods and knobs."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from osrm.backbones import Kind, find_backbone
from osrm.checkpoints import (
    Checkpoint,
    check_base_tensors,
    check_fits,
    check_task,
    named_directories,
    read_checkpoint,
)
from osrm.checks import read_json, task_name
from osrm.config import MergeConfig
from osrm.data import find_tasks, known_tasks
from osrm.errors import UserError
from osrm.glue import GlueTask
from osrm.merging import METHODS, check_knobs
from osrm.records import Recipe
from osrm.task_vectors import TaskVectors


@dataclass(frozen=True)
class Inputs:
    """One checkpoint a task, all of one base model."""

    checkpoints: dict[str, Checkpoint]
    vectors: TaskVectors
    """Their updates, stacked."""
    tasks: dict[str, GlueTask]
    """{task: its definition}; --no-eval and --eval-text can do without."""
    labels: dict[str, tuple[str, ...]]
    """{task: the classes of its head}; no class: a regression."""
    backbone: str | None
    """None if no file and no flag names the base model; --no-eval can do without."""


def read_inputs(config: MergeConfig, recipe: Recipe | None = None) -> Inputs:
    """Read and compare the checkpoints of --load-model-path, or of a recipe; raises UserError."""
    if recipe:
        where = f"--from {config.from_recipe}"
        directories = {task: Path(source.path) for task, source in recipe.tasks.items()}
    else:
        where = f"--load-model-path {config.load_model_path}"
        directories = named_directories(config.load_model_path, None)
    if odd := [task for task in directories if not task_name.holds(task)]:
        raise UserError(f"{where}: a task has {task_name.words} only; not {odd}")

    @cache
    def load_base(name: str | None, kind: Kind) -> tuple[Any, Collection[str]]:
        if name is None:
            raise UserError(f"{where}: a dense checkpoint without args.json needs --backbone")
        return kind.load(find_backbone(name), (), torch.float32)

    checkpoints = {
        task: read_checkpoint(path, lambda name, kind: load_base(config.backbone or name, kind))
        for task, path in directories.items()
    }
    tasks = definitions(checkpoints, config, where)
    if config.glue:
        for task, checkpoint in checkpoints.items():
            check_task(checkpoint, task)
    check_bases(checkpoints, config.backbone)
    check_kinds(checkpoints, config)
    labels = {task: head_labels(task, run, tasks, config.glue) for task, run in checkpoints.items()}
    names = [config.backbone]
    names += [run.args.get("backbone") or run.base for run in checkpoints.values()]
    backbone = next((name for name in names if name), None)
    if backbone is None and not config.no_eval:
        raise UserError(f"{where}: nothing says what the base model is; add --backbone")
    if backbone is None and "model" in config.export:
        raise UserError(f"{where}: --export model needs the base model; add --backbone")
    for task, run in checkpoints.items():
        if run.base_tensors:
            if backbone is None:
                raise UserError(f"{run.path}: it holds tensors of its base; name it: --backbone")
            check_base_tensors(run, find_backbone(backbone), labels[task])
    vectors = TaskVectors.stack({task: run.updates for task, run in checkpoints.items()})
    return Inputs(checkpoints, vectors, tasks, labels, backbone)


def definitions(
    checkpoints: Mapping[str, Checkpoint], config: MergeConfig, where: str
) -> dict[str, GlueTask]:
    """{task: its definition in its data}; raises UserError if one is missing and is needed."""
    tasks: dict[str, GlueTask] = {}
    for name, run in checkpoints.items():
        data_dir = config.data_dir or run.args.get("data_dir")
        if config.glue:
            (tasks[name],) = find_tasks([name], where, data_dir)
        elif known := known_tasks(data_dir).get(name):
            tasks[name] = known
    return tasks


def check_bases(checkpoints: Mapping[str, Checkpoint], backbone: str | None) -> None:
    """Refuse updates of different pre-trained models: they cannot be added.

    With --backbone the user says that different names mean one model.
    """
    names = {task: checkpoint.base for task, checkpoint in checkpoints.items()}
    prints = {task: run.args.get("body_fingerprint") for task, run in checkpoints.items()}
    # The weights themselves say more than a path, which may differ between machines.
    known = prints if all(prints.values()) else names
    different = {base: task for task, base in known.items() if base}
    if known is names and backbone:
        return
    if len(different) > 1:
        first, second, *_ = different.values()
        raise UserError(
            f"tasks '{first}' and '{second}' have different base models ({names[first]},"
            f" {names[second]}); only updates of one base can be merged. If these are two names"
            " of one model, give --backbone"
        )


def check_kinds(checkpoints: Mapping[str, Checkpoint], config: MergeConfig) -> None:
    """Refuse models of different kinds, and scores of what they are not for."""
    kinds = {checkpoint.kind: task for task, checkpoint in checkpoints.items()}
    if len(kinds) > 1:
        first, second, *_ = kinds
        raise UserError(
            f"tasks '{kinds[first]}' and '{kinds[second]}' are of different kinds ({first},"
            f" {second}); merge adapters of one task_type"
        )
    (kind,) = kinds
    if config.eval_text and not kind.models_language:
        raise UserError(
            f"the adapters are of kind {kind}, and --eval-text scores language models (CAUSAL_LM);"
            " leave it out"
        )
    if config.glue and not (kind.classifies_text or kind == Kind()):
        raise UserError(
            f"the adapters are of kind {kind}, and GLUE's scores need text classification"
            " (SEQ_CLS); add --no-eval, or --eval-text for a language model"
        )


def check_base(inputs: Inputs) -> None:
    """Refuse an update or head that does not fit the base model; none of its weights are read."""
    backbone = find_backbone(inputs.backbone or "")
    for task, checkpoint in inputs.checkpoints.items():
        model, new = checkpoint.kind.load(backbone, inputs.labels[task], "auto", "meta")
        check_fits(checkpoint, model, new)


def head_labels(
    task: str, checkpoint: Checkpoint, tasks: Mapping[str, GlueTask], glue: bool
) -> tuple[str, ...]:
    """The task's classes, or as many as its head has outputs; none: a regression.

    The scores need the task's own: any other head is refused.
    """
    if not glue and not checkpoint.kind.has_classes:
        return ()
    matrices = [tensor for tensor in checkpoint.head.values() if tensor.ndim == 2]
    outputs = min(map(len, matrices), default=0)
    if task in tasks and outputs == tasks[task].num_labels:
        return tasks[task].labels
    if glue:
        head = f"its head has {outputs} outputs" if outputs else "it has no trained head"
        raise UserError(
            f"{checkpoint.path}: {head}, {task} needs {tasks[task].num_labels}; train the head"
            " too (PEFT: modules_to_save), or merge with --no-eval"
        )
    return tuple(f"LABEL_{i}" for i in range(outputs)) if outputs != 1 else ()


Knobs = dict[str, dict[str, Any]]
"""{method: {knob: value}}"""


def choose_methods(config: MergeConfig) -> Knobs:
    """The methods and knobs of --hparams, --methods, --scale, --density and --trim, all checked.

    With --search every λ is 1 until the best is found.
    """
    table = read_json(config.hparams, "--hparams")
    if not isinstance(table, dict) or not all(isinstance(knobs, dict) for knobs in table.values()):
        raise UserError(f"--hparams {config.hparams}: expected {{method: {{knob: value}}}}")
    scale = 1.0 if config.search else config.scale
    flags = {"scale": scale, "density": config.density, "trim": config.trim}
    flags = {knob: value for knob, value in flags.items() if value is not None}
    names = config.methods
    if names in ([], ["all"]):
        looking = [n for n, method in METHODS.items() if method.needs and not config.glue]
        names = [name for name in table if name not in looking]
    methods: Knobs = {}
    problems = [] if names else ["no method; name one"]
    for name in names:
        takes = METHODS[name].knobs if name in METHODS else ()
        given = {knob: flags[knob] for knob in takes if knob in flags}
        methods[name] = {**table.get(name, {}), **given}
        try:
            check_knobs(name, methods[name])
            if METHODS[name].needs and not config.glue:
                without = "--no-eval" if config.no_eval else "--eval-text"
                problems.append(f"{name} looks at data, which {without} leaves out")
        except UserError as error:
            problems.append(str(error))
    for knob, value in flags.items():
        if methods and not any(knob in knobs for knobs in methods.values()):
            named = "--search" if config.search and knob == "scale" else f"--{knob} {value}"
            problems.append(f"{named}: none of {', '.join(methods)} has the knob '{knob}'")
    if problems:
        raise UserError(f"--methods, --hparams {config.hparams}: {'; '.join(problems)}")
    return methods


def fit_methods(methods: Knobs, config: MergeConfig, inputs: Inputs) -> None:
    """Put the --weights, TASK=X each, into the knobs of every method that has some.

    Methods that look at layer inputs are refused where a layer's bias has an update, too.
    """
    looking = [name for name in methods if METHODS[name].needs]
    biases = [name for name in inputs.vectors if name.endswith(".bias")]
    if looking and biases:
        raise UserError(
            f"--methods {' '.join(looking)}: they look at what enters a layer, and"
            f" {biases[0].removesuffix('.bias')} has an update of its bias, too (lora_bias); leave"
            " them out"
        )
    if not config.weights:
        return
    weights = dict.fromkeys(inputs.checkpoints, 1.0)
    problems = []
    for text in config.weights:
        task, _, number = text.partition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if task not in weights or not math.isfinite(weight):
            tasks = [*inputs.checkpoints]
            problems.append(f"'{text}': expected TASK=X with X a number and TASK of {tasks}")
        weights[task] = weight
    takers = [name for name in methods if "weights" in METHODS[name].knobs]
    if not takers:
        problems.append(f"none of {', '.join(methods)} takes weights")
    if problems:
        raise UserError(f"--weights: {'; '.join(problems)}")
    for name in takers:
        methods[name]["weights"] = list(weights.values())
        check_knobs(name, methods[name])
