"""Journey 3: stack the updates, merge them, score every task, print the table."""

from __future__ import annotations

import logging
import math
import os
import re
import resource
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from pathlib import Path
from statistics import mean
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
from osrm.commands.diagnose import FILES, diagnose_merges
from osrm.commands.statistics import collect_statistics
from osrm.config import MergeConfig, TrainConfig, read_json
from osrm.errors import UserError
from osrm.evaluation import evaluate
from osrm.export import export_adapter, export_model
from osrm.glue import (
    TASKS,
    find_tasks,
    fingerprint,
    load_task,
    split_task,
    tokenize,
    validation_splits,
)
from osrm.merged import RECIPE, MergedUpdate, save_merged
from osrm.merging import METHODS, check_knobs, merge, row
from osrm.merging.regmean import condition
from osrm.runs import check_output, environment, staged, write_json, write_text
from osrm.task_vectors import TaskVectors, dense

logger = logging.getLogger(__name__)

SETTINGS = ("dtype", "max_num_samples", "count_padding")
"""The flags that a merge depends on beside its inputs and knobs: --from takes the recipe's."""

Scores = dict[str, dict[str, dict[str, float]]]
"""{row of the table: {task: {metric: value}}}"""

Search = dict[str, Any]
"""One method's {"chosen_on", "grid": [λ], "scores": {task: [score]}, "average", "best": λ, "knobs":
what else was chosen, such as {"density": 0.2}: all of the best density alone}."""

Splits = dict[str, dict[str, Dataset]]
"""{task: {suffix of the metrics: tokenised examples}}"""


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
    source = read_recipe(config) if config.from_recipe else None
    if source:
        config = replace(
            config,
            backbone=config.backbone or source["backbone"],
            **{name: source[name] for name in SETTINGS if name in source},
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
    evaluation = None if config.no_eval else prepare(config, inputs, methods)
    recipe = base_recipe(config, inputs)
    with staged(directory) as staging:
        search: dict[str, Search] = {}
        merger = Merger(inputs, evaluation, recipe, staging)
        if source and "search" in source:
            search = {source["method"]: source["search"]}
        merger.save(methods, search)
        if evaluation and config.search:
            search = search_knobs(config, evaluation, merger, methods)
            best = {
                name: {**methods[name], **found["knobs"], "scale": found["best"]}
                for name, found in search.items()
            }
            merger.save(best, search)
            methods |= best
        for kind in config.export:
            export_all(kind, staging, [*methods], [*inputs.checkpoints], config.rank)
        if evaluation:
            scores = evaluate_all(evaluation, inputs, staging, [*methods])
            results = {
                "init": common_init(inputs),
                "backbone": inputs.backbone,
                "rows": report.rows(scores, methods, merger.costs),
                "search": search,
                "evaluation": evaluation.settings,
                **recipe,
            }
            write_results(staging, results)
        if evaluation and config.diagnose:
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
    ours = {
        "results.json",
        "results.md",
        "results.csv",
        "results.png",
        "tasks.png",
        "search.png",
        *FILES,
    }
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
            "max_num_samples": int(),
            "count_padding": bool(),
            "backbone": str() | None,
            "tasks": dict(tasks),
        } if tasks and all(
            isinstance(each, dict) and {"path", "sha256"} <= each.keys() for each in tasks.values()
        ):
            check_knobs(method, knobs)
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
        """{method: {"merge_seconds", "merge_peak_gib", "size_mib"[, "kept", "condition"]}}"""

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
            if self.evaluation:
                self.costs[name]["kept"] = self.kept(name)
            if needs == "moments":
                assert statistics is not None
                self.costs[name]["condition"] = max(
                    condition(statistics[module], **knobs) for module in self.inputs.vectors
                )
            logger.info(
                "%s: %d tasks merged in %.1f s, peak memory %.2f GiB, update of %.1f MiB",
                *(name, len(heads), seconds, peak, size),
            )

    def kept(self, method: str) -> float:
        """⟨received, own⟩ / ‖own‖² of the tasks' updates, mean over the tasks."""
        vectors = self.inputs.vectors
        saved = MergedUpdate(self.directory / method, vectors.tasks[0])
        products = torch.zeros(2, len(vectors.tasks), dtype=torch.float64)
        for module in vectors:
            own, part = vectors[module], saved.part(module)
            for task, delta in enumerate(own):
                received = row(part, task)
                products[0, task] += (received * delta).sum(dtype=torch.float64)
                products[1, task] += delta.square().sum(dtype=torch.float64)
        return float((products[0] / products[1]).nanmean())

    @cache  # noqa: B019  (one merger a run)
    def statistics(self, needs: str) -> Mapping[str, Any]:
        """What methods of these needs look at beside the updates."""
        assert self.evaluation is not None
        modules = [*self.inputs.vectors]
        return collect_statistics(needs, self.evaluation, self.inputs.checkpoints, modules)


def reset_peak_memory() -> None:
    """Let the peak begin anew; only Linux can."""
    switch = Path("/proc/self/clear_refs")
    if os.access(switch, os.W_OK):
        switch.write_text("5")


def peak_memory() -> float:
    """Peak of this process's resident memory, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def export_all(
    kind: str, directory: Path, methods: list[str], tasks: list[str], rank: int | None
) -> None:
    """Write every merge in another format, where it has one: <method>/adapters or models/<task>."""
    for method in methods:
        for task in tasks:
            merged = MergedUpdate(directory / method, task)
            target = directory / method / f"{kind}s" / task
            if kind == "model":
                export_model(merged, target)
                continue
            try:
                found = export_adapter(merged, target, rank)
            except UserError as error:
                logger.warning("%s", error)
                break
            if task == tasks[0]:
                write_json(directory / method / "adapters" / "truncation.json", found)
                logger.info(
                    "%s: adapters of rank %d, relative error %.2g",
                    *(method, found["rank"], found["error"]),
                )


def write_results(directory: Path, results: dict[str, Any]) -> None:
    """results.json, the table and the plots."""
    write_json(directory / "results.json", results)
    write_text(
        directory / "results.md", report.table([results]) + "\n" + report.cost_table(results)
    )
    report.write_csv(results, directory / "results.csv")
    report.plot([results], directory / "results.png")
    report.plot_tasks(results, directory / "tasks.png")
    if results["search"]:
        report.plot_search(results["search"], directory / "search.png")


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

    def model(self, task: str) -> Any:
        """The pre-trained model with a new head for the task."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        labels = TASKS[task].labels
        return load_model(self.backbone, labels, self.tokenizer, torch.float32).to(device)

    def score(self, model: Any, task: str, splits: Splits, title: str) -> dict[str, float]:
        """The metrics of a model with the task's head on the task's part of `splits`."""
        batch_size = self.settings[task]["batch_size"]
        return evaluate(model, TASKS[task], splits[task], self.tokenizer, batch_size, title)


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
        settings[name] = {**chosen, "batch_size": config.per_device_eval_bsz}
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
        backbone, tokenizer, settings, reported, held_out, train, config.count_padding
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


class Rescaled(Mapping[str, Tensor]):
    """λ times an update, computed one module at a time."""

    def __init__(self, update: Mapping[str, Tensor], scale: float) -> None:
        self.update, self.scale = update, scale

    def __getitem__(self, module: str) -> Tensor:
        return self.scale * self.update[module]

    def __iter__(self) -> Iterator[str]:
        return iter(self.update)

    def __len__(self) -> int:
        return len(self.update)


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
    scores: dict[str, list[float]] = {method: [] for method in methods}
    for method in methods:
        update = MergedUpdate(merged / method, task)
        for scale in grid:
            with applied(model, Rescaled(update, scale)):
                title = f"{task}: {method}, λ = {scale:g}"
                metrics = evaluation.score(model, task, evaluation.held_out, title)
            scores[method].append(metrics[f"eval_{TASKS[task].score}"])
    return scores


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
) -> Scores:
    """Score the pre-trained body, each task's own update and every merge, with the task's head.

    One model is in memory at a time, and lent one update after the other.
    """
    scores: Scores = {name: {} for name in ("pre-trained", "individual", *methods)}
    for name, checkpoint in inputs.checkpoints.items():
        model = evaluation.model(name)
        load_head(model, checkpoint.head)
        own = {module: dense(update) for module, update in checkpoint.updates.items()}
        for line in scores:
            update: Mapping[str, Tensor]
            if line in methods:
                update = MergedUpdate(merged / line, name)
            else:
                update = own if line == "individual" else {}
            with applied(model, update):
                scores[line][name] = evaluation.score(
                    model, name, evaluation.reported, f"{name}: {line}"
                )
    return scores
