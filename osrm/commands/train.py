"""Journey 1: one LoRA adapter and head a task, from a start of the table."""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path

import psutil
from torch import Tensor

from osrm import processes
from osrm.adapters import save_adapter, write_factors
from osrm.commands.setting import (
    Setting,
    collect_features,
    finish,
    load_setting,
    make_plan,
    prepare_starts,
    run_args,
    start_energies,
    with_lora,
)
from osrm.commands.transform import read_sources, transform
from osrm.config import TrainConfig, derive_seed
from osrm.errors import Diverged
from osrm.features import FeatureFile
from osrm.glue import TASKS, GlueTask
from osrm.runs import (
    CHECKPOINTS,
    METRICS,
    check_output,
    check_unfinished,
    locked,
    peak_memory,
    reset_peak_memory,
    run_dir,
    run_name,
    staged,
    write_args,
    write_json,
)
from osrm.training import fit, full_state

logger = logging.getLogger(__name__)


def train(config: TrainConfig) -> None:
    """Run train_glue.py: plan, load, take features, then one task after the other.

    Raises:
        Diverged: at the end, if a task did; the others are finished.
    """
    plan = make_plan(config)
    if config.only_features:
        setting = load_setting(plan)
        collect_features(setting, setting.new_model(plan.tasks[0]))
        peak = peak_memory(setting.device.type)
        logger.info("the features are in %s; peak memory %.2f GiB", config.feature_bank, peak)
        return
    check_output(Path(config.output_dir))
    todo = [
        task for task in plan.tasks if check_unfinished(run_dir(config, task.name), config.resume)
    ]
    for task in plan.tasks:
        if task not in todo:
            logger.info("%s is finished: %s", task.name, run_dir(config, task.name))
    diverged: list[str] = []
    if todo:
        setting = load_setting(plan)
        with locked(*(run_dir(config, task.name) for task in todo)):
            diverged = work(setting, todo)
    if processes.is_first():
        path = Path(config.output_dir) / f"load_model_path-{run_name(config)}.json"
        directories = {name: run_dir(config, name) for name in TASKS}
        finished = {name: str(at) for name, at in directories.items() if (at / METRICS).exists()}
        write_json(path, finished)
        logger.info("merge them with: python merge.py --load-model-path %s", path)
    if diverged:
        raise Diverged("; ".join(diverged))


def work(setting: Setting, todo: list[GlueTask]) -> list[str]:
    """Train or transform `todo`; returns what was wrong with the tasks that diverged."""
    plan = setting.plan
    sources = read_sources(setting) if plan.config.load_model_path else {}
    reset_peak_memory()
    features, start = prepare_starts(setting, plan.tasks if sources else todo)
    if sources:
        transform(setting, todo, features, start, sources)
        return []
    energies = start_energies(features, start, plan.others) if processes.is_first() else {}
    peak, since = peak_memory(setting.device.type), psutil.Process().create_time()
    diverged = []
    for task in todo:
        more = {f"start_energy_{side}": each for side, each in energies.get(task.name, {}).items()}
        more["peak_memory_features"] = peak
        try:
            train_task(setting, task, features, start[task.name], more, since)
        except Diverged as error:
            diverged.append(f"{task.name}: {error}")
            logger.error("%s", diverged[-1])
        since = time.time()
    return diverged


def train_task(
    setting: Setting,
    task: GlueTask,
    features: dict[str, FeatureFile],
    start: dict[str, Tensor],
    more: dict[str, float],
    since: float,
) -> None:
    """Train one task's adapter and head, score it, and leave it all in its run directory.

    Args:
        more: what is known already, for metrics.json.
        since: when the command, or the work on this task, began.
    """
    plan, config = setting.plan, setting.plan.config
    directory = run_dir(config, task.name)
    base = setting.new_model(task)
    args = run_args(setting, task, base, features)
    model = with_lora(setting, task, base, config.rank, config.alpha)
    write_factors(model, start)
    write_args(directory, args)
    if processes.is_first() and not (directory / "init_model").exists():
        with staged(directory / "init_model") as staging:
            save_adapter(model, staging)
    data = setting.tokenized(task)
    logger.info(
        "%s: %d examples, %d select the epoch, %d are reported; %d epochs at lr %g",
        *(task.name, len(data.train), len(data.selection), len(data.validation[""])),
        *(plan.epochs[task.name], plan.lrs[task.name]),
    )
    reset_peak_memory()
    trainer = fit(
        model,
        task,
        data,
        setting.tokenizer,
        config,
        plan.epochs[task.name],
        plan.lrs[task.name],
        derive_seed(config.seed, task.name, "training"),
        directory / CHECKPOINTS,
    )
    peak = peak_memory(setting.device.type)
    reset_peak_memory()
    state = full_state(trainer)
    scored = model if state is None else trainer.model_wrapped  # {} in all processes but the first
    metrics = setting.score(task, scored, data) | more
    metrics["train_samples"] = len(data.train)
    if trainer.state.best_metric is not None:
        metrics[f"selection_{task.select}"] = trainer.state.best_metric
    metrics |= {
        "train_runtime": trainer.state.log_history[-1]["train_runtime"],
        "seconds_to_first_step": trainer.first_step - since,
        "peak_memory_training": peak,
        "peak_memory_evaluation": peak_memory(setting.device.type),
    }
    if processes.is_first():
        trainer.state.save_to_json(str(directory / "trainer_state.json"))
    finish(setting, task, model, args, metrics, state)
    if processes.is_first():
        shutil.rmtree(directory / CHECKPOINTS, ignore_errors=True)
