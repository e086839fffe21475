"""The two commands: osrm-train is train_glue.py, osrm-merge is merge.py."""

from __future__ import annotations

from functools import partial

from osrm.config import MergeConfig, TrainConfig
from osrm.errors import run_script
from osrm.flags import parse

TRAIN = """Train one LoRA adapter a task, from a start of your choice, ready to be merged.

python train_glue.py --backbone minilm --tasks mrpc stsb --init contrastive --epochs 3 --lr 2e-3
"""
MERGE = """Merge the adapters of several tasks into one model, and score it on each of them.

python merge.py --load-model-path load_model_path.json --methods task_arithmetic ties emr
"""


def train_glue() -> None:
    """Read the flags, then train."""
    config = parse(TrainConfig, TRAIN)
    from osrm.commands.train import train  # late: --help need not wait for torch

    train(config)


def merge() -> None:
    """Read the flags, then merge."""
    config = parse(MergeConfig, MERGE)
    from osrm.commands.merge import run  # late: --help need not wait for torch

    run(config)


osrm_train, osrm_merge = partial(run_script, train_glue), partial(run_script, merge)
"""The console scripts; they return exit codes."""
