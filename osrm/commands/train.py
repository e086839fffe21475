"""Journey 1: one LoRA adapter and head a task, from a start of the table."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

from osrm import processes
from osrm.adapters import save_adapter, write_factors
from osrm.commands.finish import run_args, save_run, with_lora
from osrm.commands.plan import Plan, Start, make_plan, open_session, prepare_start
from osrm.commands.transform import transform
from osrm.config import TrainConfig
from osrm.errors import Diverged
from osrm.evaluation import scores
from osrm.files import check_output, locked, staged, write_json
from osrm.glue import GlueTask
from osrm.measure import peak_memory, reset_peak_memory
from osrm.runs import CHECKPOINTS, METRICS, check_unfinished, run_dir, run_name, write_args
from osrm.session import Session
from osrm.training import fit, full_state

logger = logging.getLogger(__name__)


def train(config: TrainConfig) -> None:
    """Run train_glue.py: plan, load, collect features, then one task after the other.

    Raises Diverged at the end, if a task did; the others are finished.
    """
    plan = make_plan(config)
    if config.only_features:
        session = open_session(plan)
        prepare_start(plan, session, plan.tasks)
        peak = peak_memory(session.device.type)
        logger.info("the features are in %s; peak memory %.2f GiB", config.feature_bank, peak)
        return
    check_output(Path(config.output_dir))
    todo = []
    for task in plan.tasks:
        directory = run_dir(config, task.name)
        if check_unfinished(directory, config.resume):
            todo.append(task)
        else:
            logger.info("%s is finished: %s", task.name, directory)
    diverged: list[str] = []
    if todo:
        session = open_session(plan)
        with locked(*(run_dir(config, task.name) for task in todo)):
            diverged = work(plan, session, todo)
    if processes.is_first():
        path = Path(config.output_dir) / f"load_model_path-{run_name(config)}.json"
        # Runs with other data, too: their tasks come last.
        names = [*plan.known, *sorted(folder.name for folder in path.parent.iterdir())]
        runs = {name: run_dir(config, name) for name in names}
        write_json(path, {name: str(run) for name, run in runs.items() if (run / METRICS).exists()})
        logger.info("merge them with: python merge.py --load-model-path %s", path)
    if diverged:
        raise Diverged("; ".join(diverged))


def work(plan: Plan, session: Session, todo: list[GlueTask]) -> list[str]:
    """Train or transform `todo`; returns what was wrong with the tasks that diverged."""
    if plan.sources:
        transform(plan, session, todo)
        return []
    reset_peak_memory()
    start = prepare_start(plan, session, todo)
    energies = start.energies(plan.others) if processes.is_first() else {}
    peak, since = peak_memory(session.device.type), psutil.Process().create_time()
    diverged = []
    for task in todo:
        metrics = {**energies.get(task.name, {}), "peak_memory_features": peak}
        try:
            train_task(plan, session, task, start, metrics=metrics, since=since)
        except Diverged as error:
            diverged.append(f"{task.name}: {error}")
            logger.error("%s", diverged[-1])
        since = time.time()
    return diverged


def train_task(
    plan: Plan,
    session: Session,
    task: GlueTask,
    start: Start,
    *,
    metrics: Mapping[str, float],
    since: float,
) -> None:
    """Train one task's adapter and head, score it, and leave it all in its run directory.

    `metrics` are known before the training; `since`: when the work on this task began.
    """
    config = plan.configs[task.name]
    directory = run_dir(config, task.name)
    base = session.model(task)
    args = run_args(plan, session, task, base, features=start.features)
    model = with_lora(config, task, base, rank=config.rank, alpha=config.alpha)
    write_factors(model, start.A[task.name])
    write_args(directory, args)
    if processes.is_first() and not (directory / "init_model").exists():
        with staged(directory / "init_model") as staging:
            save_adapter(model, staging)
    data = session.tokenized(task)
    logger.info(
        "%s: %d examples, %d select the epoch, %d are reported; %d epochs at lr %g",
        *(task.name, len(data.train), len(data.selection), len(data.validation[""])),
        *(config.epochs, config.lr),
    )
    reset_peak_memory()
    penalty = start.penalty(config.shift_penalty, model, task.name, plan.others)
    trainer = fit(model, task, data, session.tokenizer, config=config, penalty=penalty)
    peak = peak_memory(session.device.type)
    reset_peak_memory()
    state = full_state(trainer)
    scored = model if state is None else trainer.model_wrapped  # {} in all processes but the first
    metrics = {**scores(task, session.predict(scored, task, data.validation)), **metrics}
    metrics["train_samples"] = len(data.train)
    if trainer.state.best_metric is not None:
        metrics[f"selection_{task.select}"] = trainer.state.best_metric
    metrics["train_runtime"] = trainer.state.log_history[-1]["train_runtime"]
    metrics["seconds_to_first_step"] = trainer.first_step - since
    metrics["peak_memory_training"] = peak
    metrics["peak_memory_evaluation"] = peak_memory(session.device.type)
    if processes.is_first():
        trainer.state.save_to_json(str(directory / "trainer_state.json"))
    save_run(config, session, args, model, metrics=metrics, state=state)
    if processes.is_first():
        shutil.rmtree(directory / CHECKPOINTS, ignore_errors=True)
