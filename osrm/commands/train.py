"""Journey 1: one LoRA adapter and head a task, from a start of the table."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from torch import Tensor

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
from osrm.features import FeatureFile
from osrm.glue import TASKS, GlueTask
from osrm.runs import (
    CHECKPOINTS,
    METRICS,
    check_output,
    check_unfinished,
    run_dir,
    run_name,
    staged,
    write_args,
    write_json,
)
from osrm.training import fit

logger = logging.getLogger(__name__)


def train(config: TrainConfig) -> None:
    """Run train_glue.py: plan, load, take features, then one task after the other."""
    plan = make_plan(config)
    if config.only_features:
        setting = load_setting(plan)
        collect_features(setting, setting.new_model(plan.tasks[0]))
        logger.info("the features are in %s", config.feature_bank)
        return
    check_output(Path(config.output_dir))
    todo = [
        task for task in plan.tasks if check_unfinished(run_dir(config, task.name), config.resume)
    ]
    for task in plan.tasks:
        if task not in todo:
            logger.info("%s is finished: %s", task.name, run_dir(config, task.name))
    if todo:
        setting = load_setting(plan)
        sources = read_sources(setting) if config.load_model_path else {}
        features, start = prepare_starts(setting, plan.tasks if sources else todo)
        if sources:
            transform(setting, todo, features, start, sources)
        else:
            energies = start_energies(features, start, plan.others)
            for task in todo:
                train_task(setting, task, features, start[task.name], energies.get(task.name, {}))
    path = Path(config.output_dir) / f"load_model_path-{run_name(config)}.json"
    directories = {name: run_dir(config, name) for name in TASKS}
    finished = {name: str(at) for name, at in directories.items() if (at / METRICS).exists()}
    write_json(path, finished)
    logger.info("merge them with: python merge.py --load-model-path %s", path)


def train_task(
    setting: Setting,
    task: GlueTask,
    features: dict[str, FeatureFile],
    start: dict[str, Tensor],
    energies: dict[str, float],
) -> None:
    """Train one task's adapter and head, score it, and leave it all in its run directory.

    Args:
        energies: what `start_energies` found, for metrics.json.
    """
    plan, config = setting.plan, setting.plan.config
    directory = run_dir(config, task.name)
    base = setting.new_model(task)
    args = run_args(setting, task, base, features)
    model = with_lora(setting, task, base, config.rank, config.alpha)
    write_factors(model, start)
    write_args(directory, args)
    if not (directory / "init_model").exists():
        with staged(directory / "init_model") as staging:
            save_adapter(model, staging)
    data = setting.tokenized(task)
    logger.info(
        "%s: %d examples, %d select the epoch, %d are reported; %d epochs at lr %g",
        *(task.name, len(data.train), len(data.selection), len(data.validation[""])),
        *(plan.epochs[task.name], plan.lrs[task.name]),
    )
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
    metrics = setting.score(task, model, data)
    metrics |= {f"start_energy_{side}": energy for side, energy in energies.items()}
    metrics["train_samples"] = len(data.train)
    metrics["train_runtime"] = trainer.state.log_history[-1]["train_runtime"]
    if trainer.state.best_metric is not None:
        metrics[f"selection_{task.select}"] = trainer.state.best_metric
    trainer.state.save_to_json(str(directory / "trainer_state.json"))
    finish(setting, task, model, args, metrics)
    shutil.rmtree(directory / CHECKPOINTS, ignore_errors=True)
