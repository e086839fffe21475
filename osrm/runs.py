"""Run directories: their names, what stands in them, and how it gets there whole."""

from __future__ import annotations

import json
import os
import platform
import re
import resource
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from osrm import processes
from osrm.config import TrainConfig, read_json
from osrm.errors import UserError
from osrm.starts import STARTS

ARGS, METRICS, CHECKPOINTS = "args.json", "metrics.json", "checkpoints"
PACKAGES = ("torch", "transformers", "peft", "datasets", "accelerate", "numpy", "safetensors")
# Settings that do not change what a run computes: they may differ when it is resumed.
VOLATILE = {
    *("tasks", "resume", "report_to", "save_merged_model", "output_dir", "environment"),
    "feature_bank",  # where its files lie: `feature_files` has what is in them
}


DEFAULTS = TrainConfig()


def needs_features(config: TrainConfig) -> bool:
    """Only OSRM looks at features; a random start costs no pass over the data."""
    asked = config.only_features or config.load_model_path is not None
    return asked or STARTS[config.init].needs_features


def run_name(config: TrainConfig) -> str:
    """The release's name of a run: {backbone}-r{rank}-a{alpha}-{init}-fix{freeze}-..."""
    backbone = Path(config.backbone).name
    name = (
        f"{backbone}-r{config.rank}-a{config.alpha}-{config.init}-fix{config.freeze}"
        f"-{config.block}-wd{config.weight_decay}-seq{config.max_seq_len}"
    )
    if needs_features(config):
        name += f"-{config.max_num_samples}" if config.max_num_samples > 0 else "-full"
        # The settings that the release has not: its names stay as they are.
        name += "" if config.features == DEFAULTS.features else f"-{config.features}"
        name += "-padding" if config.count_padding else ""
        name += "" if config.epsilon == DEFAULTS.epsilon else f"-eps{config.epsilon:g}"
    if config.norm_match is not None:
        name += f"-norm{config.norm_match:g}"
    if config.load_model_path:
        name += f"-{config.transform}"
        if config.transform == "nullify" and config.kappa != DEFAULTS.kappa:
            name += f"{config.kappa:g}"
    return name


def run_dir(config: TrainConfig, task: str) -> Path:
    """Where the run of one task goes."""
    return Path(config.output_dir) / task / run_name(config)


def environment() -> dict[str, Any]:
    """Versions of packages and Python, and the git commit of this code (None outside git)."""
    git = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "git_commit": git.stdout.strip() or None,
    }


def reset_peak_memory() -> None:
    """Let the peaks begin anew; of resident memory only Linux can."""
    switch = Path("/proc/self/clear_refs")
    if os.access(switch, os.W_OK):
        switch.write_text("5")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory(device: str = "cpu") -> float:
    """Peak of this process's memory in GiB: on the GPU ("cuda"), or what is resident."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def args_record(config: TrainConfig, task: str, **more: Any) -> dict[str, Any]:
    """What args.json holds: every setting of one task's run."""
    return {"task": task, **asdict(config), **more, "environment": environment()}


def check_output(directory: Path) -> None:
    """Refuse an --output-dir that could not be written to, before any work.

    Raises:
        UserError: it is no directory, or lies below something that is none, or is read-only.
    """
    there = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"--output-dir {directory}: {there} is no directory; choose another")
    if not os.access(there, os.W_OK):
        raise UserError(f"--output-dir {directory}: {there} is read-only; choose another")


def check_unfinished(directory: Path, resume: bool) -> bool:
    """Whether this run is still to be done.

    Raises:
        UserError: it exists already, and --resume was not given.
    """
    if resume:
        return not (directory / METRICS).exists()
    if (directory / ARGS).exists():
        raise UserError(
            f"{directory} exists already; --resume skips what is finished and goes on with what"
            " was interrupted, another --output-dir starts anew"
        )
    return True


@contextmanager
def locked(*directories: Path) -> Iterator[None]:
    """Have these directories alone among all runs, and clear them of what killed runs left.

    A run that dies holds its locks no longer. Of several processes the first has them for all.

    Raises:
        UserError: another run has one of them.
    """
    with ExitStack() as stack:
        for directory in directories if processes.is_first() else ():
            stack.enter_context(_locked(directory))
        processes.barrier()
        yield


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    path = directory.with_name(f".{directory.name}.lock")
    new = [parent for parent in path.absolute().parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"{directory}: another run is at work there; wait for it, or choose another"
            " --output-dir"
        ) from None
    try:
        _recover(directory)
        yield
    finally:
        path.unlink()
        lock.release()
        with suppress(OSError):  # not empty: something was written
            for parent in new:
                parent.rmdir()


def _recover(directory: Path) -> None:
    """Undo what a run left half-done that was killed while it wrote into or beside `directory`."""
    beside = re.compile(rf"\.{re.escape(directory.name)}\.\d+(\.old)?")
    left = [path for path in directory.parent.iterdir() if beside.fullmatch(path.name)]
    for path in left:
        if path.suffix == ".old" and not directory.exists():
            path.replace(directory)  # it was killed between the two steps of a replacement
    for path in [*left, *directory.glob(".*")]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def write_args(directory: Path, args: dict[str, Any]) -> None:
    """Write args.json, before the first step; of several processes the first does.

    Raises:
        UserError: an interrupted run with other settings is there.
    """
    if not processes.is_first():
        return
    path = directory / ARGS
    if path.exists():
        before = read_json(path, "run directory")
        if not isinstance(before, dict):
            raise UserError(f"{path}: expected an object; delete it, and train anew")
        now = json.loads(json.dumps(args))
        changed = [
            f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
            for key in sorted({*before, *now} - VOLATILE)
            if before.get(key) != now.get(key)
        ]
        if changed:
            raise UserError(
                f"{path}: the interrupted run had other settings ({'; '.join(changed)}); give them"
                " again, or choose another --output-dir"
            )
    write_json(path, args)


def write_json(path: Path, value: Any) -> None:
    """Write readable JSON; the file appears under its name only when it is whole."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file; it appears under its name only when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    # What is no text, such as a file's name in another encoding, is written as an escape.
    temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    temporary.replace(path)


@contextmanager
def staged(directory: Path) -> Iterator[Path]:
    """A temporary directory that becomes `directory`, in place of any old one, if all goes well."""
    staging = directory.with_name(f".{directory.name}.{os.getpid()}")
    old = directory.with_name(f".{directory.name}.{os.getpid()}.old")
    staging.mkdir(parents=True)
    try:
        yield staging
        if directory.exists():
            directory.replace(old)
        staging.replace(directory)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def publish(source: Path, target: Path) -> None:
    """Move the files of `source` into the existing directory `target`, each at once."""
    for path in sorted(source.iterdir()):
        path.replace(target / path.name)
    source.rmdir()


def model_card(args: dict[str, Any], metrics: dict[str, float]) -> str:
    """README.md of a run directory: what this adapter is, how it scores, how to load it."""
    rows = "\n".join(f"| {name} | {value:.4f} |" for name, value in metrics.items())
    return f"""---
base_model: {args["base_model"]}
library_name: peft
tags: [lora, osrm, glue]
---

# {args["task"]}: LoRA on {args["backbone"]}, start of A: {args["init"]}

Rank {args["rank"]}, alpha {args["alpha"]}, projections {args["block"]}, seed {args["seed"]}.
Every setting stands in `args.json`, the training curve in `trainer_state.json`.

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
