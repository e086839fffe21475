"""Journey 3: stack the updates, merge them, score every task, print the table."""

from __future__ import annotations

import logging
import math
import os
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from osrm.backbones import find_backbone, load_model, load_tokenizer
from osrm.checkpoints import (
    Checkpoint,
    check_fits,
    check_task,
    checksum,
    named_directories,
    read_checkpoint,
)
from osrm.config import LARGEST, MergeConfig, read_json
from osrm.errors import UserError
from osrm.export import export_adapters, export_model
from osrm.merged import RECIPE, MergedUpdate, save_merged
from osrm.merging import METHODS, check_knobs, merge
from osrm.merging.regmean import condition
from osrm.runs import (
    check_output,
    environment,
    locked,
    peak_memory,
    reset_peak_memory,
    staged,
    write_json,
)
from osrm.task_vectors import TaskVectors

# Scores, data and plots need libraries that are slow to load and large: with --no-eval nothing of
# `scoring`, `statistics`, `diagnose` and `glue` is imported but to name the classes of a head.
if TYPE_CHECKING:
    from osrm.commands.scoring import Evaluation

logger = logging.getLogger(__name__)

FILES = ("results.", "predictions.parquet", "tasks.png", "search.png", "interference")
"""How the names of the files begin that stand beside the merges."""
SETTINGS = ("dtype", "max_num_samples", "count_padding")
"""The flags that a merge depends on beside its inputs and knobs: --from takes the recipe's."""

Search = dict[str, Any]
"""One method's {"chosen_on", "grid": [λ], "scores": {task: [score]}, "average", "best": λ, "knobs":
what else was chosen, such as {"density": 0.2}: all of the best density alone}."""


@dataclass(frozen=True)
class Inputs:
    """What is merged: one checkpoint a task, all of one base model."""

    checkpoints: dict[str, Checkpoint]
    vectors: TaskVectors
    """Their updates, stacked."""
    labels: dict[str, tuple[str, ...]]
    backbone: str | None
    """None where nothing says what the base is called; only --no-eval can do with that."""


def run(config: MergeConfig) -> None:
    """Run merge.py: read, merge and save with each method, search for λ, evaluate, print."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("merge.py works in one process; start it without torchrun or accelerate")
    source = read_recipe(config) if config.from_recipe else None
    if source:
        config = replace(
            config,
            backbone=config.backbone or source["backbone"],
            **{name: source[name] for name in SETTINGS},
        )
    methods = {source["method"]: source["knobs"]} if source else choose_methods(config)
    directory = Path(config.output_dir)
    check_replaceable(directory, config.overwrite)
    inputs = read_inputs(config, source)
    looking = [name for name in methods if METHODS[name].needs]
    if looking and (biases := [name for name in inputs.vectors if name.endswith(".bias")]):
        raise UserError(
            f"--methods {' '.join(looking)}: they look at what enters a layer, and"
            f" {biases[0].removesuffix('.bias')} has an update of its bias, too (lora_bias); leave"
            " them out"
        )
    if config.weights:
        add_weights(methods, config.weights, [*inputs.checkpoints])
    evaluation = None
    if not config.no_eval:
        from osrm.commands import scoring

        evaluation = scoring.prepare(config, inputs, methods)
    elif "model" in config.export:
        check_exportable(inputs)
    recipe = base_recipe(config, inputs)
    with locked(directory), staged(directory) as staging:
        search: dict[str, Search] = {}
        merger = Merger(inputs, evaluation, recipe, staging)
        if source and "search" in source:
            search = {source["method"]: source["search"]}
        merger.save(methods, search)
        if evaluation and config.search:
            search = scoring.search_knobs(config, evaluation, merger, methods)
            best = {
                name: {**methods[name], **found["knobs"], "scale": found["best"]}
                for name, found in search.items()
            }
            merger.save(best, search)
            methods |= best
        for kind in config.export:
            export_all(kind, staging, [*methods], [*inputs.checkpoints], config.rank)
        if evaluation:
            scoring.score_all(evaluation, merger, methods, search)
        if evaluation and config.diagnose:
            from osrm.commands.diagnose import diagnose_merges

            diagnose_merges(evaluation, inputs, staging, [*methods])
    for name in ("results.md", "interference.md"):
        if (directory / name).exists():
            print((directory / name).read_text(encoding="utf-8"))
    logger.info("The merged models%s are in %s", " and scores" if evaluation else "", directory)


def check_replaceable(directory: Path, overwrite: bool) -> None:
    """Refuse an output directory that is in the way; only an earlier merge is ever replaced."""
    check_output(directory)
    if not directory.exists():
        return
    if not overwrite:
        raise UserError(f"--output-dir {directory} exists; choose another, or add --overwrite")
    foreign = [
        path.name
        for path in directory.iterdir()
        if not path.name.startswith(FILES) and not (path / RECIPE).exists()
    ]
    if foreign:
        raise UserError(
            f"--output-dir {directory}: --overwrite replaces earlier merges alone, and"
            f" '{foreign[0]}' in it is none; choose another directory"
        )


def choose_methods(config: MergeConfig) -> dict[str, dict[str, Any]]:
    """{method: knobs} from --hparams, --methods, --scale and --density, all checked.

    With --search every λ is 1 until the best is found.
    """
    table = read_json(config.hparams, "--hparams")
    if not isinstance(table, dict) or not all(isinstance(knobs, dict) for knobs in table.values()):
        raise UserError(f"--hparams {config.hparams}: expected {{method: {{knob: value}}}}")
    flags = {
        "scale": 1.0 if config.search else config.scale,
        "density": config.density,
        "trim": config.trim,
    }
    methods = {}
    problems = []
    names = config.methods
    if names in ([], ["all"]):
        blind = [name for name in table if name in METHODS and METHODS[name].needs]
        names = [name for name in table if not (config.no_eval and name in blind)]
    if not names:
        problems.append("no method; name one")
    for name in names:
        takes = METHODS[name].knobs if name in METHODS else ()
        given = {knob: flags[knob] for knob in takes if flags.get(knob) is not None}
        methods[name] = {**table.get(name, {}), **given}
        try:
            check_knobs(name, methods[name])
            if METHODS[name].needs and config.no_eval:
                problems.append(f"{name} looks at data, which --no-eval leaves out")
        except UserError as error:
            problems.append(str(error))
    for knob, value in flags.items():
        if value is not None and methods and not any(knob in each for each in methods.values()):
            named = "--search" if config.search and knob == "scale" else f"--{knob} {value}"
            problems.append(f"{named}: none of {', '.join(methods)} has the knob '{knob}'")
    if problems:
        raise UserError(f"--methods, --hparams {config.hparams}: {'; '.join(problems)}")
    return methods


def read_inputs(config: MergeConfig, recipe: Mapping[str, Any] | None = None) -> Inputs:
    """Read and compare the checkpoints of --load-model-path, or of a recipe.

    Raises:
        UserError: see `named_directories`, `read_checkpoint` and `TaskVectors.stack`; checkpoints
            of different bases; task names that are not GLUE's, unless --no-eval; a head that does
            not fit the task.
    """
    if recipe:
        where = f"--from {config.from_recipe}"
        directories = {task: Path(each["path"]) for task, each in recipe["tasks"].items()}
    else:
        where = f"--load-model-path {config.load_model_path}"
        directories = named_directories(config.load_model_path, None)
    if not config.no_eval:
        from osrm.glue import find_tasks

        find_tasks(directories, where)
    # Files will be called after them; a letter has up to 4 bytes, a name 255.
    odd = [task for task in directories if not re.fullmatch(r"\w[\w.-]{,59}", task)]
    if odd:
        raise UserError(
            f"{where}: task names have up to 60 letters, digits, '_', '-', '.' only; not {odd}"
        )

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
    if backbone is None and "model" in config.export:
        raise UserError(f"{where}: --export model needs the base model; add --backbone")
    vectors = TaskVectors.stack({task: each.updates for task, each in checkpoints.items()})
    return Inputs(checkpoints, vectors, labels, backbone)


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


def check_exportable(inputs: Inputs) -> None:
    """Refuse an update or head that does not fit the base model, of which no weights are read.

    Raises:
        UserError: see `check_fits`; there is no such model.
    """
    backbone = find_backbone(inputs.backbone or "")
    tokenizer = load_tokenizer(backbone)
    for task, checkpoint in inputs.checkpoints.items():
        model = load_model(backbone, inputs.labels[task], tokenizer, "auto", device="meta")
        check_fits(checkpoint, model)


def head_labels(task: str, checkpoint: Checkpoint, config: MergeConfig) -> tuple[str, ...]:
    """The classes of a task: GLUE's, or as many as its head has outputs; none: a regression.

    Raises:
        UserError: the task is to be evaluated and has no such head.
    """
    outputs = min((len(each) for each in checkpoint.head.values() if each.ndim == 2), default=0)
    if outputs or not config.no_eval:
        from osrm.glue import TASKS

        if task in TASKS and outputs == TASKS[task].num_labels:
            return TASKS[task].labels
    if not config.no_eval:
        found = f"its head has {outputs} outputs" if outputs else "it has no trained head"
        raise UserError(
            f"{checkpoint.path}: {found}, {task} needs {TASKS[task].num_labels}; train the head"
            " too (PEFT: modules_to_save), or merge with --no-eval"
        )
    return tuple(f"LABEL_{i}" for i in range(outputs)) if outputs != 1 else ()


def read_recipe(config: MergeConfig) -> dict[str, Any]:
    """The recipe.json of --from, checked.

    Raises:
        UserError: it is none; an input has changed since.
    """
    where = f"--from {config.from_recipe}"
    recipe = read_json(str(config.from_recipe), "--from")
    match recipe:
        case {
            "method": str(method),
            "knobs": dict(knobs),
            "dtype": "float32" | "float64",
            "max_num_samples": int(samples),
            "count_padding": bool(),
            "backbone": str() | None,
            "tasks": dict(tasks),
        } if (
            tasks
            and 0 < samples <= LARGEST
            and all(
                isinstance(each, dict) and {"path", "sha256"} <= each.keys()
                for each in tasks.values()
            )
        ):
            try:
                check_knobs(method, knobs)
            except UserError as error:
                raise UserError(f"{where}: {error}") from None
        case _:
            raise UserError(f"{where}: no recipe.json of a merge; name one in a method's directory")
    for task, each in tasks.items():
        path = Path(str(each["path"]))
        if not path.is_dir():
            raise UserError(f"{where}: '{task}': no directory {path}; put the adapter back there")
        if checksum(path) != each["sha256"]:
            raise UserError(
                f"{where}: '{task}': the weights in {path} are no longer those of the recipe; put"
                " those back, or merge anew with --load-model-path"
            )
    return recipe


def add_weights(
    methods: Mapping[str, dict[str, Any]], given: Iterable[str], tasks: list[str]
) -> None:
    """Put the --weights into the knobs of every method that has some.

    Raises:
        UserError: they are not TASK=X, of other tasks, or no method takes them.
    """
    weights = dict.fromkeys(tasks, 1.0)
    problems = []
    for each in given:
        task, _, number = each.partition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if task not in weights or not math.isfinite(weight):
            problems.append(f"'{each}': expected TASK=X with X a number and TASK of {tasks}")
        weights[task] = weight
    takers = [name for name in methods if "weights" in METHODS[name].knobs]
    if not takers:
        problems.append(f"none of {', '.join(methods)} takes weights")
    if problems:
        raise UserError(f"--weights: {'; '.join(problems)}")
    for name in takers:
        methods[name]["weights"] = list(weights.values())


def base_recipe(config: MergeConfig, inputs: Inputs) -> dict[str, Any]:
    """What all methods' recipes share: the inputs with checksums, and the versions."""
    return {
        "backbone": inputs.backbone,
        "base": next((each.base for each in inputs.checkpoints.values() if each.base), None),
        **{name: getattr(config, name) for name in SETTINGS},
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


class Merger:
    """Merges and saves with one method after the other; notes what each has cost."""

    def __init__(
        self,
        inputs: Inputs,
        evaluation: Evaluation | None,
        recipe: Mapping[str, Any],
        directory: Path,
    ) -> None:
        self.inputs, self.evaluation = inputs, evaluation
        self.recipe, self.directory = recipe, directory
        self.costs: dict[str, dict[str, float]] = {}
        """{method: {"merge_seconds", "merge_peak_gib", "size_mib"[, "condition", "kept"]}}"""

    def save(
        self,
        methods: Mapping[str, dict[str, Any]],
        search: Mapping[str, Search] | None = None,
    ) -> None:
        """Merge and save with each method, in place of an earlier one."""
        heads = {task: each.head for task, each in self.inputs.checkpoints.items()}
        dtype = getattr(torch, self.recipe["dtype"])
        for name, knobs in methods.items():
            needs = METHODS[name].needs
            statistics = self.statistics(needs) if needs else None
            whole = {"method": name, "paper": METHODS[name].paper, "knobs": knobs, **self.recipe}
            if search and name in search:
                whole["search"] = search[name]
            reset_peak_memory()
            begin = time.perf_counter()
            merged = merge(name, self.inputs.vectors, statistics=statistics, dtype=dtype, **knobs)
            save_merged(self.directory / name, merged, heads, whole)
            seconds, peak = time.perf_counter() - begin, peak_memory()
            files = (self.directory / name / "updates").iterdir()
            size = sum(path.stat().st_size for path in files) / 2**20
            self.costs[name] = {
                "merge_seconds": seconds,
                "merge_peak_gib": peak,
                "size_mib": size,
            }
            if needs == "moments":
                assert statistics is not None
                self.costs[name]["condition"] = max(
                    condition(statistics[module], **knobs) for module in self.inputs.vectors
                )
            logger.info(
                "%s: %d tasks merged in %.1f s, peak memory %.2f GiB, update of %.1f MiB",
                *(name, len(heads), seconds, peak, size),
            )

    def statistics(self, needs: str) -> Mapping[str, Any]:
        """What methods of these needs look at beside the updates."""
        from osrm.commands.statistics import collect_statistics

        assert self.evaluation is not None
        modules = [*self.inputs.vectors]
        return collect_statistics(needs, self.evaluation, self.inputs.checkpoints, modules)


def export_all(
    kind: str, directory: Path, methods: list[str], tasks: list[str], rank: int | None
) -> None:
    """Write every merge in another format, where it has one: <method>/adapters or models/<task>."""
    for method in methods:
        merged = [MergedUpdate(directory / method, task) for task in tasks]
        target = directory / method / f"{kind}s"
        if kind == "model":
            for each in merged:
                export_model(each, target / each.task)
            continue
        try:
            found = export_adapters(merged, target, rank)
        except UserError as error:
            logger.warning("%s", error)
            continue
        write_json(target / "truncation.json", found)
        logger.info(
            "%s: adapters of rank %d, relative error %.2g",
            *(method, found["rank"], found["error"]),
        )
