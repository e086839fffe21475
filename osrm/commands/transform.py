"""Journey 2: existing checkpoints moved into OSRM's subspace."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from osrm.adapters import applied, load_head, write_factors, write_head
from osrm.backbones import projections
from osrm.checkpoints import Checkpoint, check_fits, check_task, read_checkpoint
from osrm.commands.setting import Setting, finish, run_args, with_lora
from osrm.errors import UserError
from osrm.features import FeatureFile
from osrm.glue import GlueTask
from osrm.runs import run_dir, write_args
from osrm.task_vectors import LoraPair, dense


def read_sources(setting: Setting, tasks: list[GlueTask]) -> dict[str, Checkpoint]:
    """The checkpoints to transform, all read and checked before the first step; none in training.

    Raises:
        UserError: unreadable files; updates of other layers or shapes than --block; another head.
    """
    config = setting.plan.config
    sources = {}
    for task in tasks:
        if task.name not in setting.plan.sources:
            continue
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


def transform_task(
    setting: Setting,
    task: GlueTask,
    features: dict[str, FeatureFile],
    start: dict[str, Tensor],
    checkpoint: Checkpoint,
) -> None:
    """Move one checkpoint's update into OSRM's subspace: A is kept, B = ΔW A⁺ / scaling.

    Sec. 5.4 of the paper. The trained head goes with it. How much of the update an A of r
    directions can hold is written into metrics.json, with the scores before and after.
    """
    config = setting.plan.config
    base = setting.new_model(task)
    data = setting.tokenized(task)
    load_head(base, checkpoint.head)
    deltas = {name: dense(update) for name, update in checkpoint.updates.items()}
    with applied(base, deltas):
        before = setting.score(task, base, data)
    args = run_args(setting, task, base, features)
    model = with_lora(setting, task, base)
    scaling = config.alpha / config.rank
    moved = {name: LoraPair.project(deltas[name], A, scaling) for name, A in start.items()}
    write_factors(model, start, {name: pair.B for name, pair in moved.items()})
    write_head(model, checkpoint.head)
    write_args(run_dir(config, task.name), args)
    metrics = setting.score(task, model, data)
    metrics |= {f"source_{name}": value for name, value in before.items()}
    whole = sum(float(delta.square().sum()) for delta in deltas.values())
    kept = sum(float(pair.delta.square().sum()) for pair in moved.values())
    metrics["kept_share_of_update"] = kept / whole if whole else 1.0
    finish(setting, task, model, args, metrics)
