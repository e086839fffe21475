"""Journey 2: existing checkpoints moved away from the features of the other tasks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from osrm.adapters import write_factors, write_head
from osrm.backbones import head_tensors, projections
from osrm.checkpoints import Checkpoint, check_fits, check_task, checksum, read_checkpoint
from osrm.commands.finish import run_args, save_run, with_lora
from osrm.commands.plan import Plan, Start, prepare_start
from osrm.errors import UserError
from osrm.evaluation import scores
from osrm.glue import GlueTask
from osrm.interference import squared_shift
from osrm.lending import applied
from osrm.merging import merge
from osrm.moments import own_and_others
from osrm.runs import run_dir, write_args
from osrm.session import Session
from osrm.task_vectors import Lazy, LoraPair, TaskVectors, Update, deltas, dense, on
from osrm.transforms import factorised, nullify, uniform


def read_source(plan: Plan, session: Session, task: GlueTask) -> Checkpoint:
    """The checkpoint to transform, checked; raises UserError if it does not fit task or --block."""
    config = plan.config
    base = session.model(task)
    checkpoint = read_checkpoint(plan.sources[task.name], lambda *_: (base, head_tensors(base)))
    check_task(checkpoint, task.name)
    check_fits(checkpoint, base)
    odd = sorted({*checkpoint.updates} ^ {*projections(base, config.block, config.rank)})
    if odd:
        raise UserError(
            f"--block {config.block}: {checkpoint.path} ({task.name}) does not update the same"
            f" {len(odd)} layers ({odd[0]}, ...); give the --block that it was trained with"
        )
    return checkpoint


def transform(plan: Plan, session: Session, tasks: list[GlueTask]) -> None:
    """Move the updates of all checkpoints; save those of `tasks`, and score them.

    The names of the scores before the move begin with "source_", those under the average of all
    tasks' updates with "source_merged_" and "merged_".
    """
    sources = {task.name: read_source(plan, session, task) for task in plan.tasks}
    start = prepare_start(plan, session, plan.tasks)
    moved, shares = move(plan, start, sources)
    averages = {}
    if len(sources) > 1:
        before = {task: checkpoint.updates for task, checkpoint in sources.items()}
        averages["source_merged_"] = average(before, session.device)
        averages["merged_"] = average(moved, session.device)
    for task in tasks:
        config, checkpoint, pairs = plan.configs[task.name], sources[task.name], moved[task.name]
        base = session.model(task, checkpoint.head)
        args = run_args(plan, session, task, base, features=start.features)
        args["source"] = {
            "path": str(checkpoint.path),
            "sha256": checksum(checkpoint.path),
            "held_out": held_out(checkpoint.args),
        }
        write_args(run_dir(config, task.name), args)
        source, device = checkpoint.updates, session.device
        updates = {"source_": deltas(source, device), "": deltas(pairs, device), **averages}
        splits = session.encoded_splits(task)
        metrics: dict[str, float] = {}
        for prefix, update in updates.items():
            with applied(base, update):
                values = scores(task, session.predict(base, task, splits))
            metrics |= {prefix + name: value for name, value in values.items()}
        metrics["own_output_kept"], metrics["others_output_left"] = shares[task.name].tolist()
        # Ordinary LoRA has one rank and scaling for all layers.
        rank = max(len(pair.A) for pair in pairs.values())
        alpha = max(1, round(next(iter(pairs.values())).scaling * rank))
        model = with_lora(config, task, base, rank=rank, alpha=alpha)
        padded = {name: uniform(pair, rank, alpha / rank) for name, pair in pairs.items()}
        A = {name: pair.A for name, pair in padded.items()}
        write_factors(model, A, {name: pair.B for name, pair in padded.items()})
        write_head(model, checkpoint.head)
        save_run(config, session, args, model, metrics=metrics)


def move(
    plan: Plan, start: Start, sources: Mapping[str, Checkpoint]
) -> tuple[dict[str, dict[str, LoraPair]], dict[str, Tensor]]:
    """Every task's update after --transform; one layer's statistics are in memory at a time.

    Returns the updates, and {task: the shares of ‖ΔW Xᵀ‖_F² that are left on features of the own
    task, to be kept, and of the others, to vanish}.
    """
    config = plan.config
    scaling = config.alpha / config.rank
    pairs: dict[str, dict[str, LoraPair]] = {task: {} for task in sources}
    energies = {task: torch.zeros(2, 2, dtype=torch.float64) for task in sources}
    layers: dict[str, list[str]] = {}
    leaders = next(iter(start.features.values())).leaders
    for module in next(iter(sources.values())).updates:
        layers.setdefault(leaders[module], []).append(module)
    for members in layers.values():
        moments = {task: file[members[0]] for task, file in start.features.items()}
        for task, own, others in own_and_others(moments, sources, plan.others):
            assert own is not None and others is not None  # a plan without them is refused
            device = own.data.device
            updates = {name: on(device, sources[task].updates[name]) for name in members}
            if config.transform == "project":
                moved = {
                    name: LoraPair.project(dense(update), start.A[task][name].to(device), scaling)
                    for name, update in updates.items()
                }
            else:
                # The layers read one input: all in one solve.
                factors = [factorised(update, config.rank, scaling) for update in updates.values()]
                A = torch.cat([pair.A.float() for pair in factors])
                A = nullify(A, own, others, kappa=config.kappa, epsilon=config.epsilon)
                parts = zip(members, factors, A.split([len(pair.A) for pair in factors]))
                moved = {name: replace(pair, A=part) for name, pair, part in parts}
            pairs[task] |= {name: pair.to("cpu") for name, pair in moved.items()}
            for name, update in updates.items():
                for i, version in enumerate((update, moved[name])):
                    for j, moment in enumerate((own, others)):
                        energies[task][i, j] += squared_shift(version, moment)
    return pairs, {task: (left[1] / left[0]).nan_to_num(1.0) for task, left in energies.items()}


def average(updates: Mapping[str, Mapping[str, Update]], device: torch.device) -> Lazy[Tensor]:
    """What every task receives of the average of {task: updates}."""
    merged = merge("average", TaskVectors.stack(updates), device=device)
    return Lazy(merged, lambda name: merged[name][0])


def held_out(args: Mapping[str, Any]) -> str | None:
    """The fingerprint of the examples that a run with these args held out; None without any."""
    if args.get("select_on") == "held-out":
        match args:
            case {"source": {"held_out": own}} | {"data": {"selection": {"fingerprint": own}}}:
                return own
    return None
