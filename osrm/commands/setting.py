"""What all tasks of one command share: the checked plan, data and models, run directories."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from torch import Tensor
from transformers import set_seed
from transformers.integrations import get_available_reporting_integrations

from osrm import processes
from osrm.adapters import (
    add_lora,
    applied,
    linear_weight,
    load_head,
    read_adapter,
    save_adapter,
)
from osrm.backbones import (
    Backbone,
    body_fingerprint,
    find_backbone,
    load_model,
    load_tokenizer,
    projections,
)
from osrm.checkpoints import named_directories
from osrm.config import TrainConfig, derive_seed, per_task
from osrm.errors import UserError
from osrm.evaluation import predict_splits, scores
from osrm.features import (
    FeatureFile,
    check_comparable,
    read_bank,
    starts,
    task_features,
)
from osrm.glue import (
    TASKS,
    GlueTask,
    TaskData,
    available_tasks,
    feature_batches,
    find_tasks,
    fingerprint,
    load_task,
    split_task,
    tokenize,
)
from osrm.interference import relative_energy
from osrm.moments import without
from osrm.runs import (
    METRICS,
    args_record,
    model_card,
    needs_features,
    publish,
    run_dir,
    staged,
    write_json,
    write_text,
)
from osrm.task_vectors import dense

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """All that is known before the first long step, and checked."""

    config: TrainConfig
    backbone: Backbone
    tasks: list[GlueTask]
    others: list[str]
    """The tasks that A avoids, with data or in the bank."""
    bank: dict[str, FeatureFile]
    epochs: dict[str, int]
    lrs: dict[str, float]
    sources: dict[str, Path]


@dataclass(frozen=True)
class Setting:
    """What all tasks of a run share."""

    plan: Plan
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    data: dict[str, TaskData]

    def new_model(self, task: GlueTask) -> Any:
        """The pre-trained model with the task's own fresh head."""
        plan = self.plan
        set_seed(derive_seed(plan.config.seed, task.name, "head"))
        model = load_model(plan.backbone, task.labels, self.tokenizer, self.dtype)
        return model.to(self.device)

    def tokenized(self, task: GlueTask) -> TaskData:
        """The task's data, ready for the model."""

        def encode(dataset: Any) -> Any:
            return tokenize(dataset, task, self.tokenizer, self.plan.config.max_seq_len)

        data = self.data[task.name]
        validation = {name: encode(split) for name, split in data.validation.items()}
        return TaskData(encode(data.train), encode(data.selection), validation)

    def score(self, task: GlueTask, model: Any, data: TaskData) -> dict[str, float]:
        """GLUE's metrics on the reported examples."""
        batch_size = self.plan.config.per_device_eval_bsz
        found = predict_splits(model, task, data.validation, self.tokenizer, batch_size)
        return scores(task, found)


def make_plan(config: TrainConfig) -> Plan:
    """Read every file that the flags name, and refuse what cannot work.

    Raises:
        UserError: unknown tasks, broken or incomplete JSON, nothing that A could avoid.
    """
    backbone = find_backbone(config.backbone)
    config = replace(config, data_dir=config.data_dir or backbone.data_dir)
    available = available_tasks(config.data_dir)
    tasks = find_tasks(config.tasks or available, "--tasks")
    bank = read_bank(Path(config.feature_bank)) if config.feature_bank else {}
    others = list(dict.fromkeys(config.other_tasks or [*available, *bank]))
    find_tasks([name for name in others if name not in bank], "--other-tasks")
    names = [task.name for task in tasks]
    if not tasks:
        raise UserError(f"--data-dir {config.data_dir}: no folder in it is named after a GLUE task")
    alone = any({*others} <= {name} for name in names)
    if needs_features(config) and alone and not config.only_features:
        raise UserError(
            f"--init {config.init} needs features of other tasks to avoid; name some: --other-tasks"
        )
    check_loggers(config.report_to)
    epochs, lrs = dict.fromkeys(names, config.epochs), dict.fromkeys(names, config.lr)
    if config.load_epochs:
        epochs = per_task(config.load_epochs, "--load-epochs", names, int)
    if config.load_lrs:
        lrs = per_task(config.load_lrs, "--load-lrs", names, float)
    sources = {}
    if config.load_model_path:
        sources = named_directories(config.load_model_path, names)
    return Plan(config, backbone, tasks, others, bank, epochs, lrs, sources)


def check_loggers(report_to: str) -> None:
    """Refuse a --report-to that the Trainer would refuse later."""
    known = ["none", "all", *get_available_reporting_integrations()]
    if report_to not in known:
        raise UserError(f"--report-to {report_to}: unknown or not installed; here are {known}")


def load_setting(plan: Plan) -> Setting:
    """Tokenizer and data; all data is checked before any of it is used.

    What accelerate or torchrun started as several processes is from here on connected.
    """
    config = plan.config
    # One of several processes computes all starts while the others wait.
    cpu = not torch.cuda.is_available()
    device = PartialState(cpu=cpu, timeout=timedelta(hours=4)).device
    low = device.type == "cuda" and torch.cuda.is_bf16_supported()
    auto = "bfloat16" if low else "float32"
    if config.load_model_path:  # nothing is trained, and differences of weights must not be rounded
        auto = "float32"
    dtype = getattr(torch, auto if config.dtype == "auto" else config.dtype)
    tokenizer = load_tokenizer(plan.backbone)
    absent = [name for name in plan.others if name not in plan.bank]
    others = find_tasks(absent if needs_features(config) else [], "--other-tasks")
    data = {
        task.name: split_task(
            load_task(task, config.data_dir),
            config.seed,
            config.max_train_samples,
            config.max_eval_samples,
            config.max_test_samples,
            config.select_on,
        )
        for task in dict.fromkeys([*plan.tasks, *others])
    }
    return Setting(plan, tokenizer, device, dtype, data)


def prepare_starts(
    setting: Setting, tasks: list[GlueTask]
) -> tuple[dict[str, FeatureFile], dict[str, dict[str, Tensor]]]:
    """The feature statistics, if they are needed, and {task: {module: A before training}}."""
    config = setting.plan.config
    model = setting.new_model(setting.plan.tasks[0])
    features = collect_features(setting, model) if needs_features(config) else {}
    if config.only_features or (config.load_model_path and config.transform == "nullify"):
        return features, {}  # no start is looked at
    start = start_factors(setting, model, tasks, features) if processes.is_first() else {}
    return features, processes.of_first(start)


def collect_features(setting: Setting, model: Any) -> dict[str, FeatureFile]:
    """The feature statistics of all tasks, own and avoided: from the bank, the cache, or new.

    Raises:
        UserError: a file of the bank that is not comparable with this backbone and these flags.
    """
    plan, config = setting.plan, setting.plan.config
    modules = projections(model, config.block, config.rank)
    shared = {
        "backbone": plan.backbone.name,
        "body_fingerprint": body_fingerprint(model),
        "max_seq_len": config.max_seq_len,
        "features": config.features,
        "count_padding": config.count_padding,
        "seed": config.seed,
    }
    wanted = dict.fromkeys([*plan.others, *(task.name for task in plan.tasks)])
    found = {name: plan.bank[name] for name in wanted if name in plan.bank}
    for file in found.values():
        check_comparable(file, shared, modules)
        logger.info("features of %s: %s", file.path.stem, file.path)
    for name in wanted:
        if name in found:
            continue
        task, train = TASKS[name], setting.data[name].train
        count = config.max_num_samples if config.max_num_samples > 0 else len(train)
        samples = train.select(range(min(count, len(train))))
        encoded = tokenize(samples, task, setting.tokenizer, config.max_seq_len)
        pad_to = config.max_seq_len if config.count_padding else None
        batch_size = config.per_device_eval_bsz
        batches = feature_batches(encoded, setting.tokenizer, batch_size, pad_to)
        settings = {**shared, "task": name, "samples": len(samples), "data": fingerprint(samples)}
        path = Path(config.feature_bank) / f"{name}.safetensors" if config.feature_bank else None
        found[name] = task_features(settings, model, modules, batches, path)
    return found


def start_factors(
    setting: Setting, model: Any, tasks: list[GlueTask], features: Mapping[str, FeatureFile]
) -> dict[str, dict[str, Tensor]]:
    """{task: {module: A before training}} from --init."""
    plan, config = setting.plan, setting.plan.config
    widths = {
        name: linear_weight(model, name).shape[1]
        for name in projections(model, config.block, config.rank)
    }
    return starts(
        config.init,
        [task.name for task in tasks],
        widths,
        config.rank,
        config.seed,
        features,
        next(iter(features.values())).leaders if features else {},
        plan.others,
        config.epsilon,
        config.norm_match,
    )


def start_energies(
    features: Mapping[str, FeatureFile],
    start: Mapping[str, Mapping[str, Tensor]],
    others: Sequence[str],
) -> dict[str, dict[str, float]]:
    """{task: how much energy A meets before training}: 1 is that of random directions.

    Means over the layers, of the own features and of those of the other tasks; see
    `relative_energy`.
    """
    found: dict[str, dict[str, float]] = {}
    for module in next(iter(start.values())) if features else ():
        moments = {task: file[module] for task, file in features.items()}
        avoided = {task: moments[task] for task in others}
        total = reduce(add, avoided.values())
        for task, factors in start.items():
            sides = {"own": moments[task], "others": without(total, avoided, task)}
            for side, moment in sides.items():
                energies = found.setdefault(task, {"own": 0.0, "others": 0.0})
                energies[side] += relative_energy(factors[module], moment) / len(factors)
    for task, energies in found.items():
        logger.info(
            "%s: energy along A before training, 1 being that of random directions:"
            " own features %.3f, the other tasks' %.3f",
            *(task, energies["own"], energies["others"]),
        )
    return found


def with_lora(setting: Setting, task: GlueTask, base: Any, rank: int, alpha: int) -> PeftModel:
    """`base` with LoRA on the layers of --block."""
    config = setting.plan.config
    set_seed(derive_seed(config.seed, task.name, "lora"))
    return add_lora(base, projections(base, config.block, rank), rank, alpha, config.freeze)


def run_args(
    setting: Setting, task: GlueTask, base: Any, features: Mapping[str, FeatureFile]
) -> dict[str, Any]:
    """What args.json of one task's run says: every setting."""
    plan, data = setting.plan, setting.data[task.name]
    return args_record(
        plan.config,
        task.name,
        epochs=plan.epochs[task.name],
        lr=plan.lrs[task.name],
        other_tasks=[name for name in plan.others if name != task.name] if features else [],
        feature_files={name: file.sha256 for name, file in features.items()},
        base_model=plan.backbone.path,
        num_labels=task.num_labels,
        body_fingerprint=body_fingerprint(base),
        data={
            name: {"examples": len(split), "fingerprint": fingerprint(split)}
            for name, split in {
                "train": data.train,
                "selection": data.selection,
                **{f"validation{end}": split for end, split in data.validation.items()},
            }.items()
        },
    )


def finish(
    setting: Setting,
    task: GlueTask,
    model: PeftModel,
    args: dict[str, Any],
    metrics: dict[str, float],
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Save adapter, dense model if asked for, card, and last of all metrics.json.

    Of several processes the first does so.

    Args:
        state: all tensors of a `model` that is sharded over the processes.
    """
    directory = run_dir(setting.plan.config, task.name)
    if not processes.is_first():
        return
    with staged(directory / "adapter") as staging:
        save_adapter(model, staging, state)
    publish(directory / "adapter", directory)
    if setting.plan.config.save_merged_model:
        save_dense(setting, task, directory)
    write_text(directory / "README.md", model_card(args, metrics))
    write_json(directory / METRICS, metrics)
    main = {name: round(value, 4) for name, value in metrics.items() if "samples" not in name}
    logger.info("%s: %s\n%s: saved in %s", task.name, main, task.name, directory)


def save_dense(setting: Setting, task: GlueTask, directory: Path) -> None:
    """Write merged_model/, W0 + ΔW in float32, from the adapter in the run directory."""
    updates, head, _ = read_adapter(directory)
    dense_model = load_model(setting.plan.backbone, task.labels, setting.tokenizer, torch.float32)
    load_head(dense_model, head)
    with (
        staged(directory / "merged_model") as staging,
        applied(dense_model, {name: dense(update) for name, update in updates.items()}),
    ):
        dense_model.save_pretrained(staging)
        setting.tokenizer.save_pretrained(staging)
