"""What train_glue.py is asked to do, checked; the data; the A that each task starts from."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import str_to_bool
from torch import Tensor
from transformers.integrations import get_available_reporting_integrations

from osrm import processes
from osrm.backbones import Backbone, body_fingerprint, find_backbone, load_tokenizer, projections
from osrm.bank import FeatureFile, check_comparable, read_bank
from osrm.checkpoints import named_directories
from osrm.checks import number, per_task, whole
from osrm.config import TrainConfig
from osrm.data import available_tasks, find_tasks, known_tasks, load_task, split_task
from osrm.errors import UserError
from osrm.glue import GlueTask
from osrm.interference import relative_energy
from osrm.lending import linear_weight
from osrm.moments import own_and_others
from osrm.penalty import ShiftPenalty
from osrm.runs import needs_features
from osrm.session import Session
from osrm.starts import STARTS, StartConfig, starts

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """The flags, and the small files that they name."""

    config: TrainConfig
    backbone: Backbone
    known: dict[str, GlueTask]
    """GLUE's tasks and the data's own."""
    tasks: list[GlueTask]
    others: list[str]
    """The tasks that A avoids, with data or in the bank."""
    bank: dict[str, FeatureFile]
    configs: dict[str, TrainConfig]
    """{task: the flags with its epochs and learning rate}"""
    sources: dict[str, Path]
    """{task: checkpoint to transform}; empty when adapters are trained."""


def make_plan(config: TrainConfig) -> Plan:
    """Read every small file that the flags name; raises UserError for what cannot work."""
    backbone = find_backbone(config.backbone)
    config = replace(config, data_dir=config.data_dir or backbone.data_dir)
    available = available_tasks(config.data_dir)
    tasks = find_tasks(config.tasks or available, "--tasks", config.data_dir)
    bank = read_bank(Path(config.feature_bank)) if config.feature_bank else {}
    others = list(dict.fromkeys(config.other_tasks or [*available, *bank]))
    find_tasks([name for name in others if name not in bank], "--other-tasks", config.data_dir)
    names = [task.name for task in tasks]
    if not names:
        raise UserError(
            f"--data-dir {config.data_dir}: no folder in it is named after a GLUE task, and no"
            " tasks.json defines others; add one"
        )
    alone = any({*others} <= {name} for name in names)
    if needs_features(config) and alone and not config.only_features:
        asking = "--shift-penalty" if config.shift_penalty else f"--init {config.init}"
        raise UserError(
            f"{asking} needs features of other tasks to avoid; name some: --other-tasks"
        )
    if config.shift_penalty and str_to_bool(os.environ.get("ACCELERATE_USE_FSDP", "false")):
        raise UserError("--shift-penalty needs whole factors, which FSDP shards; train without it")
    loggers = ["none", "all", *get_available_reporting_integrations()]
    if config.report_to not in loggers:
        raise UserError(
            f"--report-to {config.report_to}: unknown or not installed; choose one of {loggers}"
        )
    configs = dict.fromkeys(names, config)
    if config.load_epochs:
        epochs = per_task(config.load_epochs, "--load-epochs", names, whole(1))
        configs = {name: replace(configs[name], epochs=epochs[name]) for name in names}
    if config.load_lrs:
        lrs = per_task(config.load_lrs, "--load-lrs", names, number(0, low_open=True))
        configs = {name: replace(configs[name], lr=lrs[name]) for name in names}
    sources = named_directories(config.load_model_path, names) if config.load_model_path else {}
    known = known_tasks(config.data_dir)
    return Plan(config, backbone, known, tasks, others, bank, configs, sources)


def open_session(plan: Plan) -> Session:
    """Load the tokenizer and the data of all tasks, and check all of it.

    Several processes that accelerate or torchrun started are connected from here on.
    """
    config = plan.config
    # One of several processes computes all starts while the others wait.
    cpu = not torch.cuda.is_available()
    device = PartialState(cpu=cpu, timeout=timedelta(hours=4)).device
    low = device.type == "cuda" and torch.cuda.is_bf16_supported()
    # A transform trains nothing, and differences of weights must not be rounded.
    auto = "bfloat16" if low and not plan.sources else "float32"
    dtype = getattr(torch, auto if config.dtype == "auto" else config.dtype)
    tokenizer = load_tokenizer(plan.backbone)
    names = [*plan.configs]
    if needs_features(config):
        names += [name for name in plan.others if name not in {*names, *plan.bank}]
    data = {
        name: split_task(
            load_task(plan.known[name], config.data_dir),
            config.seed,
            max_train=config.max_train_samples,
            max_selection=config.max_eval_samples,
            max_validation=config.max_test_samples,
            select_on=config.select_on,
        )
        for name in names
    }
    lengths = dict.fromkeys(data, config.max_seq_len)
    bsz = config.per_device_eval_bsz
    return Session(
        plan.backbone, tokenizer, device, dtype, config.seed, bsz, plan.known, lengths, data
    )


@dataclass(frozen=True)
class Start:
    """What all tasks start from."""

    features: dict[str, FeatureFile]
    """{task: its statistics}, own and avoided; empty if A does not depend on features."""
    A: dict[str, dict[str, Tensor]]
    """{task: {module: A before training}}; empty if nothing looks at a start."""

    def penalty(
        self, weight: float, model: Any, task: str, others: list[str]
    ) -> ShiftPenalty | None:
        """That of --shift-penalty, on the task's PeftModel; None for weight 0."""
        if not weight:
            return None
        leaders = self.features[task].leaders
        return ShiftPenalty(weight, model, self.features, leaders, task=task, others=others)

    def energies(self, others: list[str]) -> dict[str, dict[str, float]]:
        """{task: {"start_energy_own": ..., "start_energy_others": ...}}, means over the layers.

        The energy that A meets before training, see `relative_energy`; empty without features.
        """
        if not self.features:
            return {}
        energies = {task: {"start_energy_own": 0.0, "start_energy_others": 0.0} for task in self.A}
        modules = next(iter(self.A.values()))
        for module in modules:
            moments = {task: file[module] for task, file in self.features.items()}
            for task, *sides in own_and_others(moments, self.A, others):
                for name, moment in zip(energies[task], sides, strict=True):
                    assert moment is not None  # a plan without other tasks is refused
                    A = self.A[task][module].to(moment.data.device)
                    energy = relative_energy(A, moment)
                    energies[task][name] += energy / len(modules)
        for task, means in energies.items():
            logger.info(
                "%s: energy along A before training, 1 is that of random directions:"
                " own features %.3f, the other tasks' %.3f",
                *(task, *means.values()),
            )
        return energies


def prepare_start(plan: Plan, session: Session, tasks: list[GlueTask]) -> Start:
    """Collect the statistics, if they are needed, and choose A for each of `tasks`."""
    config = plan.config
    model = session.model(plan.tasks[0])
    features = collect_features(plan, session, model) if needs_features(config) else {}
    if config.only_features or (plan.sources and config.transform == "nullify"):
        return Start(features, {})
    A: dict[str, dict[str, Tensor]] = {}
    if processes.is_first():
        modules = projections(model, config.block, config.rank)
        looked = features if STARTS[config.init].needs_features else {}
        A = starts(
            StartConfig(config.init, config.epsilon, config.norm_match, config.seed),
            {name: (config.rank, linear_weight(model, name).shape[1]) for name in modules},
            [task.name for task in tasks],
            features=looked,
            leaders=next(iter(looked.values())).leaders if looked else {},
            others=plan.others,
        )
    return Start(features, processes.of_first(A))


def collect_features(plan: Plan, session: Session, model: Any) -> dict[str, FeatureFile]:
    """The feature statistics of all tasks, own and avoided: from the bank, the cache, or new."""
    config = plan.config
    modules = projections(model, config.block, config.rank)
    settings = {"features": config.features, "count_padding": config.count_padding}
    comparable = {"body_fingerprint": body_fingerprint(model), **settings}
    names = dict.fromkeys([*plan.others, *plan.configs])
    files = {name: plan.bank[name] for name in names if name in plan.bank}
    for file in files.values():
        check_comparable(file, comparable, modules)
        file.device = session.device
        logger.info("features of %s: %s", file.path.stem, file.path)
    for name in [name for name in names if name not in files]:
        train = session.data[name].train
        samples = train.head(config.max_num_samples) if config.max_num_samples > 0 else train
        path = Path(config.feature_bank) / f"{name}.safetensors" if config.feature_bank else None
        key = session.key(model, session.tasks[name], samples, **settings)
        files[name] = session.statistics(model, modules, key, samples, path=path)
    return files
