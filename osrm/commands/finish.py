"""What training and transforming put into a task's run directory."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import set_seed

from osrm import processes
from osrm.adapters import add_lora, read_adapter, save_adapter
from osrm.backbones import body_fingerprint, load_model, projections
from osrm.bank import FeatureFile
from osrm.commands.plan import Plan
from osrm.config import TrainConfig
from osrm.data import fingerprint
from osrm.files import publish, staged, write_json, write_text
from osrm.glue import GlueTask
from osrm.lending import applied, load_head
from osrm.runs import METRICS, args_record, model_card, run_dir
from osrm.seeds import derive_seed
from osrm.session import Session
from osrm.task_vectors import deltas

logger = logging.getLogger(__name__)


def with_lora(
    config: TrainConfig, task: GlueTask, base: Any, *, rank: int, alpha: int
) -> PeftModel:
    """`base` with LoRA on the layers of --block."""
    set_seed(derive_seed(config.seed, task.name, "lora"))
    return add_lora(base, projections(base, config.block, rank), rank, alpha, freeze=config.freeze)


def run_args(
    plan: Plan, session: Session, task: GlueTask, base: Any, *, features: Mapping[str, FeatureFile]
) -> dict[str, Any]:
    """The content of a run's args.json: every setting, and fingerprints of base model and data."""
    data = session.data[task.name]
    splits = {"train": data.train, "selection": data.selection}
    splits |= {f"validation{suffix}": split for suffix, split in data.validation.items()}
    prints = {n: {"examples": len(d), "fingerprint": fingerprint(d)} for n, d in splits.items()}
    return args_record(
        plan.configs[task.name],
        task.name,
        other_tasks=[name for name in plan.others if name != task.name] if features else [],
        feature_files={name: file.sha256 for name, file in features.items()},
        base_model=plan.backbone.path,
        num_labels=task.num_labels,
        body_fingerprint=body_fingerprint(base),
        data=prints,
    )


def save_run(
    config: TrainConfig,
    session: Session,
    args: dict[str, Any],
    model: PeftModel,
    *,
    metrics: dict[str, float],
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Save the adapter, its card, and the dense model W0 + ΔW if --save-merged-model asks for it.

    metrics.json comes last: with it the run is finished. Of several processes the first saves;
    `state` has all tensors of a `model` that is sharded over them.
    """
    if not processes.is_first():
        return
    task = session.tasks[args["task"]]
    directory = run_dir(config, task.name)
    with staged(directory / "adapter") as staging:
        save_adapter(model, staging, state)
    publish(directory / "adapter", directory)
    if config.save_merged_model:
        adapter = read_adapter(directory)
        dense = load_model(session.backbone, task.labels, session.tokenizer, torch.float32)
        load_head(dense, adapter.head)
        updates = deltas(adapter.updates)
        with staged(directory / "merged_model") as staging, applied(dense, updates):
            dense.save_pretrained(staging)
            session.tokenizer.save_pretrained(staging)
    write_text(directory / "README.md", model_card(args, metrics))
    write_json(directory / METRICS, metrics)
    main = {name: round(value, 4) for name, value in metrics.items() if "samples" not in name}
    logger.info("%s: %s\n%s: saved in %s", task.name, main, task.name, directory)
