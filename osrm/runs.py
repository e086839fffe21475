"""Run directories: their names, their files, and which of them are finished."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from osrm import processes
from osrm.checks import read_object
from osrm.config import TrainConfig
from osrm.errors import UserError
from osrm.files import write_json
from osrm.measure import environment
from osrm.starts import STARTS

ARGS, METRICS, CHECKPOINTS = "args.json", "metrics.json", "checkpoints"
# Settings that do not change what a run computes: they may differ when it is resumed.
VOLATILE = {
    *("tasks", "resume", "report_to", "save_merged_model", "output_dir", "environment"),
    "feature_bank",  # a path; `feature_files` records the content
}


def needs_features(config: TrainConfig) -> bool:
    """Whether the run uses feature statistics; without them it makes no pass over the data."""
    asked = config.only_features or config.load_model_path or config.shift_penalty
    return bool(asked) or STARTS[config.init].needs_features


def run_name(config: TrainConfig) -> str:
    """The release's name of a run: {backbone}-r{rank}-a{alpha}-{init}-fix{freeze}-..."""
    name = (
        f"{Path(config.backbone).name}-r{config.rank}-a{config.alpha}-{config.init}"
        f"-fix{config.freeze}-{config.block}-wd{config.weight_decay}-seq{config.max_seq_len}"
    )
    if needs_features(config):
        name += f"-{config.max_num_samples}" if config.max_num_samples > 0 else "-full"
        # The release lacks these settings; with the defaults, its names stay as they are.
        name += "" if config.features == TrainConfig.features else f"-{config.features}"
        name += "-padding" if config.count_padding else ""
        name += "" if config.epsilon == TrainConfig.epsilon else f"-eps{config.epsilon:g}"
    if config.norm_match is not None:
        name += f"-norm{config.norm_match:g}"
    if config.shift_penalty:
        name += f"-shift{config.shift_penalty:g}"
    if config.load_model_path:
        name += f"-{config.transform}"
        if config.transform == "nullify" and config.kappa != TrainConfig.kappa:
            name += f"{config.kappa:g}"
    return name


def run_dir(config: TrainConfig, task: str) -> Path:
    """The run directory of one task."""
    return Path(config.output_dir) / task / run_name(config)


def args_record(config: TrainConfig, task: str, **more: Any) -> dict[str, Any]:
    """The content of args.json: every setting of one task's run."""
    return {"task": task, **asdict(config), **more, "environment": environment()}


def check_unfinished(directory: Path, resume: bool) -> bool:
    """Whether this run still has to be done; a UserError if it exists and `resume` is not given."""
    if resume:
        return not (directory / METRICS).exists()
    if (directory / ARGS).exists():
        raise UserError(
            f"{directory} exists already; give --resume to skip finished tasks and to continue"
            " interrupted ones, or another --output-dir to start anew"
        )
    return True


def write_args(directory: Path, args: dict[str, Any]) -> None:
    """Write args.json, before the first step; only the first of several processes writes.

    Raises UserError if the directory holds an interrupted run with other settings.
    """
    if not processes.is_first():
        return
    path = directory / ARGS
    if path.exists():
        before = read_object(path, "run directory", "{setting: value}")
        now = json.loads(json.dumps(args))
        keys = sorted({*before, *now} - VOLATILE)
        pairs = {key: (before.get(key), now.get(key)) for key in keys}
        if changed := [f"{key} was {a!r}, is {b!r}" for key, (a, b) in pairs.items() if a != b]:
            problem = f"the interrupted run had other settings ({'; '.join(changed)})"
            raise UserError(f"{path}: {problem}; give them again, or choose another --output-dir")
    write_json(path, args)


def model_card(args: dict[str, Any], metrics: dict[str, float]) -> str:
    """README.md of a run directory: what the adapter is, its scores, and how to load it."""
    rows = "\n".join(f"| {name} | {value:.4f} |" for name, value in metrics.items())
    return f"""---
base_model: {args["base_model"]}
library_name: peft
tags: [lora, osrm]
---

# {args["task"]}: LoRA on {args["backbone"]}, start of A: {args["init"]}

Rank {args["rank"]}, alpha {args["alpha"]}, projections {args["block"]}, seed {args["seed"]}.
`args.json` has every setting, `trainer_state.json` the training curve.

| metric | value |
|---|---|
{rows}

```python
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

base = AutoModelForSequenceClassification.from_pretrained(
    "{args["base_model"]}", num_labels={args["num_labels"]}
)
model = PeftModel.from_pretrained(base, "path/of/this/directory")
```
"""
