"""Journey 2: existing checkpoints moved away from the features of the other tasks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor

from osrm.adapters import applied, load_head, write_factors, write_head
from osrm.backbones import projections
from osrm.checkpoints import Checkpoint, check_fits, check_task, checksum, read_checkpoint
from osrm.commands.setting import Plan, Setting, finish, run_args, with_lora
from osrm.errors import UserError
from osrm.features import FeatureFile
from osrm.glue import GlueTask
from osrm.interference import squared_shift
from osrm.merging import Updates, merge
from osrm.moments import without
from osrm.runs import run_dir, write_args
from osrm.task_vectors import LoraPair, TaskVectors, dense
from osrm.transforms import factorised, nullify, uniform


def read_sources(setting: Setting) -> dict[str, Checkpoint]:
    """The checkpoints to transform, all read and checked before the first step; none in training.

    Raises:
        UserError: unreadable files; updates of other layers or shapes than --block; another head.
    """
    config = setting.plan.config
    sources = {}
    for task in setting.plan.tasks:
        base = setting.new_model(task)

        def load_base(_: str | None, base: Any = base) -> Any:
            return base

        checkpoint = read_checkpoint(setting.plan.sources[task.name], load_base)
        check_task(checkpoint, task.name)
        check_fits(checkpoint, base)
        odd = sorted({*checkpoint.updates} ^ {*projections(base, config.block, config.rank)})
        if odd:
            raise UserError(
                f"--block {config.block}: {checkpoint.path} ({task.name}) does not update the same"
                f" {len(odd)} layers ({odd[0]}, ...); give the --block that it was trained with"
            )
        sources[task.name] = checkpoint
    return sources


@dataclass(frozen=True)
class Moved:
    """The moved update of one task, and what is left of its outputs."""

    pairs: dict[str, LoraPair]
    own: float
    """The share of ‖ΔW Xᵀ‖_F² that is left on the features of the own task: to be kept."""
    others: float
    """The same on the features of the other tasks: to vanish."""


def transform(
    setting: Setting,
    tasks: list[GlueTask],
    features: Mapping[str, FeatureFile],
    start: Mapping[str, Mapping[str, Tensor]],
    sources: Mapping[str, Checkpoint],
) -> None:
    """Move the updates of all checkpoints; save and score those of `tasks`.

    Args:
        start: {task: {module: A}} for `--transform project`, which keeps that A.
    """
    moved = move(setting.plan, features, start, sources)
    averages: dict[str, Updates] = {}
    if len(sources) > 1:
        before = TaskVectors.stack({task: each.updates for task, each in sources.items()})
        after = TaskVectors.stack({task: each.pairs for task, each in moved.items()})
        averages["source_merged_"] = merge("average", before)
        averages["merged_"] = merge("average", after)
    for task in tasks:
        save_moved(setting, task, features, sources[task.name], moved[task.name], averages)


def move(
    plan: Plan,
    features: Mapping[str, FeatureFile],
    start: Mapping[str, Mapping[str, Tensor]],
    sources: Mapping[str, Checkpoint],
) -> dict[str, Moved]:
    """Every task's update after --transform; one layer's statistics are in memory at a time."""
    config = plan.config
    scaling = config.alpha / config.rank
    pairs: dict[str, dict[str, LoraPair]] = {task: {} for task in sources}
    energies = {task: torch.zeros(2, 2, dtype=torch.float64) for task in sources}
    layers: dict[str, list[str]] = {}
    leaders = next(iter(features.values())).leaders
    for module in next(iter(sources.values())).updates:
        layers.setdefault(leaders[module], []).append(module)
    for members in layers.values():
        moments = {task: file[members[0]] for task, file in features.items()}
        avoided = {task: moments[task] for task in plan.others}
        total = reduce(add, avoided.values())
        for task, checkpoint in sources.items():
            own, others = moments[task], without(total, avoided, task)
            updates = {name: checkpoint.updates[name] for name in members}
            if config.transform == "project":
                found = {
                    name: LoraPair.project(dense(update), start[task][name], scaling)
                    for name, update in updates.items()
                }
            else:
                factors = [factorised(each, config.rank, scaling) for each in updates.values()]
                filtered = nullify(
                    torch.cat([pair.A.float() for pair in factors]),
                    own,
                    others,
                    config.kappa,
                    config.epsilon,
                ).split([len(pair.A) for pair in factors])
                found = {
                    name: replace(pair, A=A) for name, pair, A in zip(updates, factors, filtered)
                }
            pairs[task] |= found
            for name, update in updates.items():
                for i, each in enumerate((update, found[name])):
                    for j, moment in enumerate((own, others)):
                        energies[task][i, j] += squared_shift(each, moment)
    shares = {task: (table[1] / table[0]).nan_to_num(1.0) for task, table in energies.items()}
    return {
        task: Moved(pairs[task], float(shares[task][0]), float(shares[task][1])) for task in sources
    }


def held_out(args: Mapping[str, Any]) -> str | None:
    """The fingerprint of the examples that the run of these args held out; None if of none."""
    match args:
        case {"select_on": "held-out", "source": {"held_out": fingerprint}}:
            return fingerprint
        case {"select_on": "held-out", "data": {"selection": {"fingerprint": fingerprint}}}:
            return fingerprint
    return None


def save_moved(
    setting: Setting,
    task: GlueTask,
    features: Mapping[str, FeatureFile],
    checkpoint: Checkpoint,
    moved: Moved,
    averages: Mapping[str, Updates],
) -> None:
    """Save one moved update as an ordinary adapter, with the trained head, and score it.

    metrics.json has the scores before ("source_eval_...") and after, alone and under the average
    of all tasks' updates ("source_merged_eval_...", "merged_eval_..."), and `Moved`'s shares.
    """
    config = setting.plan.config
    base = setting.new_model(task)
    args = run_args(setting, task, base, features)
    args["source"] = {
        "path": str(checkpoint.path),
        "sha256": checksum(checkpoint.path),
        "held_out": held_out(checkpoint.args),
    }
    write_args(run_dir(config, task.name), args)
    data = setting.tokenized(task)
    load_head(base, checkpoint.head)
    metrics: dict[str, float] = {}

    def score(prefix: str, update: Mapping[str, Tensor]) -> None:
        with applied(base, update):
            scores = setting.score(task, base, data)
        metrics.update({prefix + name: value for name, value in scores.items()})

    score("source_", {name: dense(update) for name, update in checkpoint.updates.items()})
    score("", {name: pair.delta for name, pair in moved.pairs.items()})
    for prefix, average in averages.items():  # one update for all tasks: any row
        score(prefix, {name: average[name][0] for name in average})
    metrics |= {"own_output_kept": moved.own, "others_output_left": moved.others}
    rank = max(len(pair.A) for pair in moved.pairs.values())
    alpha = max(1, round(next(iter(moved.pairs.values())).scaling * rank))
    model = with_lora(setting, task, base, rank, alpha)
    pairs = {name: uniform(pair, rank, alpha / rank) for name, pair in moved.pairs.items()}
    write_factors(
        model,
        {name: pair.A for name, pair in pairs.items()},
        {name: pair.B for name, pair in pairs.items()},
    )
    write_head(model, checkpoint.head)
    finish(setting, task, model, args, metrics)
