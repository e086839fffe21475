"""Settings of the two scripts: one line a flag, checked before any long work."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from osrm.errors import UserError

Config = TypeVar("Config")

MINI_GLUE = "mini-glue"
"""The --data-dir of the embedded data."""

EPSILON = 1e-2
"""Of the contrastive start; README.md, "Which start", has the measurement."""


LARGEST = 2**63 - 1
"""Data, tokenizers and torch count in 64 bits."""


def flag(default: Any, help: str, *, least: float | None = None, **options: Any) -> Any:
    """A dataclass field that is also a command-line flag of its default's type.

    `least` is the smallest value allowed; the other options are argparse's. The values of a list
    are text unless `type` says otherwise.
    """
    metadata = {"least": least, "options": {"help": help, **options}}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def parse(
    cls: Callable[..., Config], description: str | None, argv: list[str] | None = None
) -> Config:
    """The dataclass `cls`, its flags read from the command line and checked.

    Raises:
        UserError: values out of range; one line names every one of them.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    for each in fields:
        options = dict(each.metadata["options"])
        names = ["--" + each.name.replace("_", "-"), *options.pop("aliases", ())]
        factory = each.default_factory
        default = each.default if factory is dataclasses.MISSING else factory()
        if isinstance(default, bool):
            options["action"] = "store_true"
        elif isinstance(default, list):
            options["nargs"] = "+"
        else:
            kind = options.setdefault("type", str if default is None else type(default))
            if kind in (int, float) and "choices" not in options:
                options.setdefault("metavar", "N" if kind is int else "X")
            if default is not None:
                options["help"] += " (default: %(default)s)"
        parser.add_argument(*names, dest=each.name, default=default, **options)
    values = vars(parser.parse_args(argv))
    problems = []
    for each in fields:
        value, least = values[each.name], each.metadata["least"]
        name = f"--{each.name.replace('_', '-')} {reprlib.repr(value)}"
        if isinstance(value, int) and abs(value) > LARGEST:
            problems.append(f"{name}: expected a number between -2^63 and 2^63")
        elif value is not None and least is not None and not least <= value < math.inf:
            problems.append(f"{name}: expected a finite number of at least {least}")
    try:
        config = cls(**values)
    except UserError as error:
        problems.append(str(error))
    if problems:
        raise UserError("; ".join(problems))
    return config


@dataclass(frozen=True)
class TrainConfig:
    """The flags of train_glue.py, with the published release's names and defaults."""

    backbone: str = flag(
        "roberta-large",
        "roberta-large, t5-large, llama3.2-1b, llama3.2-3b, llama3-8b, minilm (embedded: no hub),"
        " or a local path or hub id of a RoBERTa, BERT, MPNet, DistilBERT, T5 or Llama-family"
        " model",
    )
    tasks: list[str] = flag([], "the tasks to train, one after the other (default: all eight)")
    other_tasks: list[str] = flag(
        [], "the tasks whose features A avoids (default: all that the data has)"
    )
    init: str = flag(
        "gaussian",
        "start of A: gaussian or kaiming (PEFT's), orthogonal (a random frame), analytical (OSRM:"
        " least energy of the other tasks), contrastive (most own energy against theirs), release"
        " (the published code's, as a baseline: with --features mean --count-padding)",
        choices=("gaussian", "kaiming", "orthogonal", "analytical", "contrastive", "release"),
    )
    epsilon: float = flag(
        EPSILON,
        "contrastive and nullify: what counts as little energy, relative to the mean eigenvalue",
    )
    norm_match: float | None = flag(None, "rescale every row of A's start to this norm", type=float)
    features: str = flag(
        "token",
        "the vectors that OSRM counts: every real token, one mean a sample, or one mean a task",
        choices=("token", "sample", "mean"),
    )
    count_padding: bool = flag(
        False, "padding counts as features too; with --features mean the release's statistic"
    )
    feature_bank: str | None = flag(
        None,
        "folder of <task>.safetensors files with feature statistics: those there are used, also of"
        " tasks without data here, and those lacking are written",
        metavar="DIR",
    )
    only_features: bool = flag(False, "write the feature bank, and stop")
    max_num_samples: int = flag(100, "training examples a task for OSRM's features; <= 0: all")
    rank: int = flag(8, "rank r of the adapters", least=1)
    alpha: int = flag(16, "LoRA alpha: an update is alpha/r B A", least=1)
    freeze: str = flag("N", "A or B stays as it starts; N: both are trained", metavar="{A,B,N}")
    block: str = flag("qv", "the adapted projections: letters of q, k and v")
    load_model_path: str | None = flag(
        None,
        "JSON {task: directory}: move these checkpoints out of the other tasks' way, instead of"
        " training",
        metavar="FILE",
    )
    transform: str = flag(
        "nullify",
        "how: nullify filters A so that the update stays on own features and vanishes on the"
        " others'; project (the paper's) keeps the A of --init and fits B",
        choices=("nullify", "project"),
    )
    kappa: float = flag(
        0.3, "nullify: weight of the other tasks' features against the own", least=0
    )
    epochs: int = flag(10, "epochs of every task", least=1)
    load_epochs: str | None = flag(None, "JSON {task: epochs}, instead of --epochs", metavar="FILE")
    lr: float = flag(4e-4, "peak learning rate of every task", least=0)
    load_lrs: str | None = flag(None, "JSON {task: rate}, instead of --lr", metavar="FILE")
    lr_scheduler: str = flag(
        "linear", "learning rate schedule", choices=("linear", "constant", "constant_with_warmup")
    )
    warmup_ratio: float = flag(0.06, "share of the steps that warm up", least=0)
    weight_decay: float = flag(0.0, "AdamW's weight decay", least=0)
    per_device_train_bsz: int = flag(64, "training batch size of a device", least=1)
    per_device_eval_bsz: int = flag(64, "evaluation batch size of a device", least=1)
    grad_accumlate_steps: int = flag(
        1, "batches that make a step", least=1, aliases=["--grad-accumulate-steps"]
    )
    gradient_checkpoint: bool = flag(False, "compute activations again in the backward pass")
    max_train_samples: int = flag(105000, "training examples a task, drawn with the seed; < 0: all")
    max_eval_samples: int = flag(15000, "examples that select the best epoch; < 0: all")
    max_test_samples: int = flag(-1, "reported examples of GLUE's validation split; < 0: all")
    select_on: str = flag(
        "held-out",
        "what selects the best epoch: 10 %% of the training data that no step sees, or, as in the"
        " release, the very validation split that is reported",
        choices=("held-out", "validation"),
    )
    not_load_best_model_at_end: bool = flag(False, "keep the last epoch instead of the best")
    max_seq_len: int = flag(128, "tokens an example; a longer one loses its beginning", least=8)
    dtype: str = flag(
        "auto",
        "of the frozen weights; auto: bfloat16 on a GPU that has it, else float32",
        choices=("auto", "float32", "bfloat16"),
    )
    data_dir: str | None = flag(
        None,
        "DIR/<task>/{train,validation}.{parquet,jsonl,csv,tsv}, or mini-glue (embedded; the"
        " default with --backbone minilm); without it GLUE from the hub or its local cache",
    )
    output_dir: str = flag(".save_dir", "the run directories go here")
    save_merged_model: bool = flag(False, "write the dense model too, to merged_model/")
    report_to: str = flag("none", "loggers of the Trainer: tensorboard, wandb, ...")
    resume: bool = flag(False, "skip what is finished, go on with what was interrupted")
    seed: int = flag(42, "of the data's order, the heads, the adapters and free choices", least=0)

    def __post_init__(self) -> None:
        """Refuse combinations that cannot work."""
        problems = []
        if not self.block or set(self.block) - set("qkv") or len(set(self.block)) < len(self.block):
            problems.append(f"--block {self.block}: expected letters of q, k and v, each once")
        if self.freeze not in ("A", "B", "N"):
            both = set(self.freeze) == set("AB")
            reason = "A and B both frozen leave nothing to train" if both else "unknown"
            problems.append(f"--freeze {self.freeze}: {reason}; expected A, B or N")
        if self.lr == 0:
            problems.append("--lr 0: nothing would be trained; expected a rate above 0")
        if not 0 < self.epsilon < math.inf:
            problems.append(f"--epsilon {self.epsilon}: expected a finite number above 0")
        if self.norm_match is not None and not 0 < self.norm_match < math.inf:
            problems.append(f"--norm-match {self.norm_match}: expected a finite number above 0")
        if self.only_features and not self.feature_bank:
            problems.append("--only-features writes a bank: name its folder with --feature-bank")
        if self.warmup_ratio >= 1:
            problems.append(f"--warmup-ratio {self.warmup_ratio}: expected a share below 1")
        problems += [
            f"--max-{part}-samples 0: none are left; expected at least 1, or -1 for all"
            for part in ("train", "eval", "test")
            if getattr(self, f"max_{part}_samples") == 0
        ]
        if problems:
            raise UserError("; ".join(problems))


@dataclass(frozen=True)
class MergeConfig:
    """The flags of merge.py. What is not given comes from the runs' own args.json."""

    load_model_path: str = flag(
        "load_model_path.json",
        "JSON {task: directory}: run directories of train_glue.py, PEFT LoRA adapters, or dense"
        " checkpoints",
        metavar="FILE",
    )
    methods: list[str] = flag(
        [],
        "the merging methods (default, or all: those that --hparams lists; with --no-eval without"
        " those that look at data)",
    )
    from_recipe: str | None = flag(
        None,
        "repeat one merge: the recipe.json in its directory, instead of --load-model-path and"
        " --methods",
        metavar="FILE",
        aliases=["--from"],
    )
    hparams: str = flag("hparams/merge.json", "JSON {method: {knob: value}}", metavar="FILE")
    scale: float | None = flag(
        None, "λ of the methods that have one, instead of --hparams'", type=float
    )
    search: list[float] = flag(
        [],
        "instead of --scale: the one of these λ with the best average score on examples held out"
        " of the runs' training data, neither trained on nor reported",
        type=float,
        metavar="X",
    )
    search_density: list[float] = flag(
        [], "with --search: choose the density of the methods that have one, too", type=float
    )
    density: float | None = flag(
        None, "share of the entries that TIES keeps, instead of --hparams'", type=float
    )
    trim: str | None = flag(
        None,
        "TIES trims by one threshold for all entries of a task (global) or one a layer (tensor),"
        " instead of --hparams'",
        choices=("global", "tensor"),
    )
    weights: list[str] = flag(
        [],
        "weights of tasks in the average, task arithmetic and dare_linear, 1 for the others",
        metavar="TASK=X",
    )
    dtype: str = flag(
        "float32", "what merges are computed and stored in", choices=("float32", "float64")
    )
    max_num_samples: int = flag(
        256, "training examples of each task that RegMean and Fisher look at", least=1
    )
    count_padding: bool = flag(False, "RegMean counts padding like text, as the release does")
    export: list[str] = flag(
        [],
        "write every merge also as PEFT adapters, where its update has low rank, or as whole"
        " transformers models; one for each task",
        choices=("adapter", "model"),
    )
    rank: int | None = flag(
        None,
        "of --export adapter: at most so many, the nearest update of this rank",
        type=int,
        least=1,
    )
    diagnose: bool = flag(
        False, "measure how far adapters and merges shift each task's outputs: tables and plots"
    )
    output_dir: str = flag(".save_dir/merged", "the merged models and results go here")
    overwrite: bool = flag(False, "replace an output directory of an earlier merge")
    no_eval: bool = flag(False, "merge and save only; then any task names will do")
    backbone: str | None = flag(None, "the base model, instead of the adapters' own")
    data_dir: str | None = flag(None, "the data to evaluate on, instead of the runs' own")
    max_test_samples: int | None = flag(
        None, "reported examples of each validation split; < 0: all", type=int
    )
    per_device_eval_bsz: int = flag(64, "evaluation batch size of a device", least=1)
    eval_dtype: str = flag(
        "float32",
        "of the model that is evaluated, merged weights included",
        choices=("float32", "bfloat16"),
    )

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        problems = []
        if self.max_test_samples == 0:
            problems.append("--max-test-samples 0: none are left; expected at least 1, or -1")
        wrong = [f"{scale:g}" for scale in self.search if not 0 < scale < math.inf]
        if wrong:
            problems.append(f"--search {' '.join(wrong)}: expected finite numbers above 0")
        wrong = [f"{density:g}" for density in self.search_density if not 0 < density <= 1]
        if wrong:
            problems.append(f"--search-density {' '.join(wrong)}: expected numbers in (0, 1]")
        if self.search_density and not self.search:
            problems.append("--search-density needs --search, the grid of λ; give both")
        if self.search_density and self.density is not None:
            problems.append("--search-density and --density: give one of them")
        if self.search and self.scale is not None:
            problems.append("--search and --scale: both choose λ; give one of them")
        if self.diagnose and self.no_eval:
            problems.append("--diagnose needs the data that --no-eval leaves out; choose one")
        if self.search and self.no_eval:
            problems.append("--search and --no-eval: a search evaluates; give one of them")
        if self.rank is not None and "adapter" not in self.export:
            problems.append(f"--rank {self.rank}: only --export adapter has a rank; add it")
        given = {
            "--methods": self.methods,
            "--search": self.search,
            "--weights": self.weights,
            "--scale": self.scale is not None,
            "--density": self.density is not None,
            "--trim": self.trim,
        }
        both = [name for name, value in given.items() if value and self.from_recipe]
        if both:
            problems.append(f"--from repeats a recipe as it is: leave {', '.join(both)} out")
        if problems:
            raise UserError("; ".join(problems))


def read_json(path: str | Path, field: str) -> Any:
    """The content of a JSON file that `field` (a flag or a key) names."""
    try:
        return json.loads(
            Path(path).read_text(encoding="utf-8"), object_pairs_hook=_without_duplicates
        )
    except OSError as error:
        raise UserError(f"{field} {path}: {error.strerror}; name a JSON file") from None
    except (ValueError, RecursionError) as error:  # broken, twice a key, or too deep
        raise UserError(f"{field} {path}: broken JSON ({error}); mend the file") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON: of two values with the same key, the first would be lost silently."""
    content = dict(pairs)
    if len(content) < len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"{twice!r} occurs twice")
    return content


def per_task(path: str | Path, field: str, tasks: Iterable[str], kind: type) -> dict[str, Any]:
    """{task: value} of a JSON file, for every one of `tasks`; more tasks in it do no harm.

    Raises:
        UserError: not an object, a task is missing, or a value is no `kind` above zero
            (for `str`: is empty).
    """
    values = read_json(path, field)
    if not isinstance(values, dict):
        raise UserError(f"{field} {path}: expected an object {{task: {kind.__name__}}}")
    problems = []
    for task in tasks:
        value = values.get(task)
        number = kind is float and type(value) is int
        if task not in values:
            problems.append(f"lacks the task '{task}'; add it")
        elif not (type(value) is kind or number):
            problems.append(f"'{task}': expected {kind.__name__}, found {reprlib.repr(value)}")
        elif not value or (kind is not str and not 0 < value <= LARGEST):
            wanted = "a path" if kind is str else "a positive number below 2^63"
            problems.append(f"'{task}': expected {wanted}, found {reprlib.repr(value)}")
    if problems:
        raise UserError(f"{field} {path}: " + "; ".join(problems))
    return {task: values[task] for task in tasks}


def derive_seed(seed: int, *purpose: str) -> int:
    """A seed of 32 bits of its own for every purpose: tasks do not share random numbers."""
    digest = hashlib.sha256("/".join([str(seed), *purpose]).encode()).digest()
    return int.from_bytes(digest[:4], "big")
