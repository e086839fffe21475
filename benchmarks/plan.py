"""Memory and time of training, statistics and merging, before a GPU is paid for.

    python benchmarks/plan.py --backbone llama3-8b --gpu rtx4090 --gradient-checkpoint
    python benchmarks/plan.py --check --output benchmarks/results/plan_check.json
    python benchmarks/plan.py --output benchmarks/results/plan.json --document benchmarks/README.md

Without --backbone: the settings of `SETTINGS` and all backbones. Neither a GPU nor weights are
needed (see counting.py). --check measures the same on this machine's CPU, as far as that can be
(see measured.py). benchmarks/README.md has the numbers.
"""

from __future__ import annotations

import argparse
import json
import math
import runpy
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from counting import (
    CONFIGS,
    Count,
    OnGpu,
    adapted,
    collecting_size,
    count_forward,
    count_merge,
    count_step,
    frozen,
    gathered_size,
    moment_size,
    optimizer_size,
    pretrained,
    size,
    solving_size,
    trained,
)

from osrm.backbones import projections
from osrm.config import per_task
from osrm.merging import METHODS

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
HEADING = "## Memory and time plan"
MIB, GIB = 2**20, 2**30

# ------------------------------------------------------------------- assumptions


@dataclass(frozen=True)
class Gpu:
    """A card: published peaks of dense products in TFLOP/s, and what of them is achieved."""

    title: str
    gib: float
    """What torch says there is, a little less than the name has."""
    bf16: float
    fp32: float
    fp64: float
    bandwidth: float
    """GB/s"""
    share: float
    """Achieved share of the peak in products of this size: assumed."""


GPUS = {
    "a10": Gpu("A10, 24 GB", 22.0, 125, 31.2, 0.49, 600, 0.5),
    "rtx4090": Gpu("RTX 4090, 24 GB", 23.6, 165, 82.6, 1.29, 1008, 0.7),
    "a100-40": Gpu("A100, 40 GB", 39.5, 312, 19.5, 19.5, 1555, 0.6),
    "a100-80": Gpu("A100, 80 GB", 79.1, 312, 19.5, 19.5, 2039, 0.6),
    "h100-80": Gpu("H100 SXM, 80 GB", 79.1, 989, 67, 67, 3350, 0.5),
}
BANDWIDTH_SHARE = 0.8
"""Of the memory bandwidth, in operations that are no products."""
LAUNCH = 10e-6
"""Seconds of the host for an operation: in a step of small tensors the GPU waits for Python."""
CONTEXT = 1.0
"""GiB of the CUDA context and the libraries' workspaces."""
FRAGMENTATION = 0.05
"""What the allocator cannot use, relative to all that is allocated."""
LINK, DISK = 20e9, 1e9
"""Bytes a second: from GPU to GPU over PCIe 4.0, and of the disk."""
SOLVE = {1024: 0.21, 4096: 1.17}
"""Seconds for one A from its statistics, by width d: measured by benchmarks/starts.py on two CPU
cores (README.md, "Which start"; analytical, d = 1024 in float32). Between and beyond them a power
of d is assumed."""

EXAMPLES = {
    "mrpc": (3668, 408),
    "qnli": (104743, 5463),
    "qqp": (363846, 40430),
    "rte": (2490, 277),
    "sst2": (67349, 872),
    "mnli": (392702, 9815 + 9832),
    "cola": (8551, 1043),
    "stsb": (5749, 1500),
}
"""{task: published sizes of GLUE's training and validation split}"""
MOST_TRAIN, MOST_SELECT = 105_000, 15_000
"""train_glue.py's --max-train-samples and --max-eval-samples."""
TOKENS: dict[str, int] = runpy.run_path(str(ROOT / "benchmarks" / "starts.py"))["TOKENS"]
"""Mean tokens of an example of each task."""

SETTINGS = {
    "RoBERTa-large, 24 GB": "--backbone roberta-large --gpu a10 --gradient-checkpoint",
    "Llama-3-8B, 80 GB": (
        "--backbone llama3-8b --gpu a100-80 --gradient-checkpoint"
        " --load-epochs hparams/epoch_1.json"
    ),
    "Llama-3-8B, 4 x 24 GB, FSDP": (
        "--backbone llama3-8b --gpu a10 --gpus 4 --per-device-train-bsz 16 --gradient-checkpoint"
        " --load-epochs hparams/epoch_1.json --eval-dtype bfloat16"
    ),
    "Llama-3-8B, 4 x 24 GB, whole": (
        "--backbone llama3-8b --gpu a10 --gpus 4 --whole --per-device-train-bsz 16"
        " --gradient-checkpoint --load-epochs hparams/epoch_1.json --eval-dtype bfloat16"
    ),
}
"""The release's commands (README.md, "Train"), and the cards to run them on."""

# ------------------------------------------------------------------- the plan


@dataclass(frozen=True)
class Row:
    """A part of the memory, and where the number comes from."""

    what: str
    gib: float
    how: str


def row(what: str, size: float, how: str) -> Row:
    """A row of so many bytes."""
    return Row(what, round(size / GIB, 4), how)


def with_overhead(rows: Sequence[Row]) -> list[Row]:
    """What is allocated on a GPU, and what is lost beside it."""
    lost = FRAGMENTATION * sum(each.gib for each in rows) * GIB
    return [
        *rows,
        row("what the allocator cannot use", lost, f"assumed: {FRAGMENTATION:.0%}"),
        row("CUDA context and workspaces", CONTEXT * GIB, "assumed"),
    ]


def total(rows: Sequence[Row]) -> float:
    """GiB."""
    return round(sum(each.gib for each in rows), 2)


def solve_seconds(d: int) -> float:
    """See `SOLVE`."""
    (low, first), (high, second) = SOLVE.items()
    return first * (d / low) ** (math.log(second / first) / math.log(high / low))


class Plan:
    """One backbone with one set of flags."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Count the passes; the other numbers are computed when they are asked for."""
        self.args, self.gpu = args, GPUS[args.gpu]
        self.dtype, self.eval_dtype = getattr(torch, args.dtype), getattr(torch, args.eval_dtype)
        self.batch, self.length = args.per_device_train_bsz, args.max_seq_len
        self.sharded = args.gpus > 1 and not args.whole
        config, scored = CONFIGS[args.backbone], (args.per_device_eval_bsz, args.max_seq_len)
        self.model = adapted(config, self.dtype, args.block, args.rank)
        again = adapted(config, self.dtype, args.block, args.rank)
        self.base = pretrained(config, self.eval_dtype)
        self.modules = projections(self.base, args.block, args.rank)
        low = self.dtype == torch.bfloat16
        self.steps = {
            checkpoint: count_step(model, self.batch, self.length, checkpoint, partial(OnGpu, low))
            for checkpoint, model in ((False, self.model), (True, again))
        }
        self.forwards = {
            dtype: count_forward(
                pretrained(config, dtype), *scored, partial(OnGpu, dtype == torch.bfloat16)
            )[0]
            for dtype in (torch.bfloat16, torch.float32)
        }
        self.features, inputs = count_forward(
            pretrained(config, self.dtype), *scored, partial(OnGpu, False), self.modules
        )
        self.inputs = [tuple(each.shape) for each in inputs]
        self.layers = Counter(
            tuple(self.base.get_submodule(name).weight.shape) for name in self.modules
        )

    # -- memory

    def standing(self) -> list[Row]:
        """What is on a GPU all the time while a task is trained."""
        weights, parameters, gpus = size(frozen(self.model)), trained(self.model), self.args.gpus
        rows = [row("frozen weights", weights, "--dtype; with FSDP a share")]
        gradients = size(parameters)
        if self.sharded:
            rows = [
                row("frozen weights", weights / gpus, ""),
                row("weights gathered by FSDP", gathered_size(self.model), "two blocks, the rest"),
            ]
        elif gpus > 1:
            gradients *= 2
        return [
            *rows,
            row("adapters and head", size(parameters), "float32"),
            row("their gradients", gradients, "float32; twice for DDP, in its buckets too"),
            row("AdamW's states", optimizer_size(parameters), "two moments in float32"),
        ]

    def training(self, checkpoint: bool) -> list[Row]:
        """A training step, at its peak."""
        step = self.steps[checkpoint]
        return with_overhead(
            [
                *self.standing(),
                row("activations for the backward pass", step.kept, "counted"),
                row("beside them at the peak", step.peak - step.kept, "counted"),
            ]
        )

    def largest_batch(self, checkpoint: bool) -> int:
        """The largest power of two that fits; activations grow in proportion to the batch."""
        standing = sum(each.gib for each in self.standing())
        room = (self.gpu.gib - CONTEXT) / (1 + FRAGMENTATION) - standing
        most = room * GIB / (self.steps[checkpoint].peak / self.batch)
        return 2 ** math.floor(math.log2(most)) if most >= 1 else 0

    def collecting(self, features: str, tokens: int) -> list[Row]:
        """One task's statistics, of examples with so many tokens."""
        part = tokens / self.length
        inputs = [(batch, math.ceil(n * part), d) for batch, n, d in self.inputs]
        forward = self.features
        shorter = replace(forward, kept=forward.kept * part, peak=forward.peak * part)
        samples, item = self.args.max_num_samples, self.dtype.itemsize
        collecting = collecting_size(shorter, inputs, features, samples, item)
        return with_overhead(
            [
                row("weights", size(frozen(self.model)), self.args.dtype),
                row("passes and sums", collecting, "see `collecting_size`"),
            ]
        )

    def statistics(self) -> list[Row]:
        """Collecting, keeping and solving with the statistics of each features mode."""
        tasks, samples = self.args.tasks, self.args.max_num_samples
        widths, mean = [d for *_, d in self.inputs], max(TOKENS.values())
        usual = total(self.collecting("token", mean)) * GIB
        rows = [row(f"token: device, {mean} tokens", usual, "in all; the longest task's mean")]
        counts = {"token": samples * self.length, "sample": samples, "mean": 1}
        for features, vectors in counts.items():
            kept = "d x d of each input, at most" if features == "token" else "vectors in float32"
            disk = sum(moment_size(vectors, d) for d in widths)
            most = total(self.collecting(features, self.length)) * GIB
            solving = solving_size(tasks, vectors, max(widths))
            rows += [
                row(f"{features}: device, at most", most, "in all; of --max-seq-len tokens"),
                row(f"{features}: on disk, a task", disk, kept),
                row(f"{features}: on disk, {tasks} tasks", disk * tasks, "cache or bank"),
                row(f"{features}: solving for A", solving, "host; the widest input, all tasks"),
            ]
        return rows

    def merging(self) -> list[Row]:
        """Merging all tasks, one module at a time, on the host."""
        rank, tasks = self.args.rank, self.args.tasks
        factors = sum((out + width) * rank * 4 * n for (out, width), n in self.layers.items())
        rows = [row(f"{tasks} adapters", tasks * factors, "float32 factors, all at once")]
        counted = {name: count_merge(name, self.layers, rank, tasks) for name in METHODS}
        kinds: dict[str, list[str]] = {"methods with factors": [], "dense methods": []}
        for name, found in counted.items():
            blind = "methods with factors" if found.factors else "dense methods"
            kinds.setdefault(name if METHODS[name].needs else blind, []).append(name)
        for kind, names in kinds.items():
            peak = max(names, key=lambda name: counted[name].peak)
            disk = max(names, key=lambda name: counted[name].disk)
            how = "with all tasks' statistics of it" if kind == peak else f"counted; most: {peak}"
            rows.append(row(f"{kind}: a module", counted[peak].peak, how))
            how = "" if kind == disk else f"most: {disk}"
            rows.append(row(f"{kind}: on disk", counted[disk].disk, how))
        disk = tasks * self._whole() * self.dtype.itemsize
        return [*rows, row(f"{tasks} x --export model", disk, "in --dtype")]

    def scoring(self, dtype: torch.dtype) -> list[Row]:
        """Scoring merges on one GPU, one task after the other."""
        weights = self._whole() * dtype.itemsize
        kept = sum(out * width * n for (out, width), n in self.layers.items()) * dtype.itemsize
        rows = [
            row("the evaluated model", weights, "--eval-dtype"),
            row("the adapted layers as they were", kept, "to be put back"),
            row("a forward pass", self.forwards[dtype].peak, "counted"),
        ]
        return with_overhead(rows)

    def _whole(self) -> int:
        """How many numbers the backbone has."""
        return sum(each.numel() for each in self.base.parameters())

    # -- time

    def pass_seconds(self, count: Count, dtype: torch.dtype, part: float) -> float:
        """A pass over this part of its tokens: products and all else, or what the host needs."""
        peak = self.gpu.bf16 if dtype == torch.bfloat16 else self.gpu.fp32
        products = count.flops / (peak * 1e12 * self.gpu.share)
        others = count.moved / (self.gpu.bandwidth * 1e9 * BANDWIDTH_SHARE)
        return max(count.operations * LAUNCH, (products + others) * part)

    def step_seconds(self, part: float = 1.0) -> float:
        """A training step; meanwhile FSDP gathers the weights twice. DDP's gradients are few."""
        step = self.steps[self.args.gradient_checkpoint]
        others = 1 - 1 / self.args.gpus
        gathering = 2 * size(frozen(self.model)) * others / LINK if self.sharded else 0.0
        return max(self.pass_seconds(step, self.dtype, part), gathering)

    def forward_seconds(self, examples: float, dtype: torch.dtype, part: float = 1.0) -> float:
        """So many examples in forward passes."""
        batches = examples / self.args.per_device_eval_bsz
        return batches * self.pass_seconds(self.forwards[dtype], dtype, part)

    def hours(self) -> dict[str, dict[str, float]]:
        """{task: its epochs, steps, and hours at its mean length and at the longest}."""
        args, found = self.args, {}
        epochs = dict.fromkeys(EXAMPLES, args.epochs)
        if args.load_epochs:
            epochs = per_task(ROOT / args.load_epochs, "--load-epochs", EXAMPLES, int)
        for task, (examples, validation) in EXAMPLES.items():
            held_out = max(1, examples // 10)
            batch = self.batch * args.gpus
            steps = math.ceil(min(MOST_TRAIN, examples - held_out) / batch) * epochs[task]
            scored = (min(MOST_SELECT, held_out) * epochs[task] + validation) / args.gpus
            found[task] = {"epochs": epochs[task], "steps": steps}
            for name, part in (("hours", self.part(task)), ("longest", 1.0)):
                seconds = steps * self.step_seconds(part)
                seconds += self.forward_seconds(scored, self.dtype, part)
                found[task][name] = round(seconds / 3600, 3)
        return found

    def part(self, task: str) -> float:
        """The mean length of a task's examples, relative to the longest."""
        return min(1.0, TOKENS[task] / self.length)

    def step(self) -> dict[str, float]:
        """What a training step computes, and how long that takes."""
        step, seconds = self.steps[self.args.gradient_checkpoint], self.step_seconds()
        peak = self.gpu.bf16 if self.dtype == torch.bfloat16 else self.gpu.fp32
        return {
            "TFLOP": step.flops / 1e12,
            "GiB read and written beside products": step.moved / GIB,
            "operations": step.operations,
            "seconds": seconds,
            "share of the peak FLOP/s": step.flops / seconds / (peak * 1e12),
        }

    def seconds(self) -> dict[str, float]:
        """Of what is not training."""
        tasks, examples = self.args.tasks, self.args.max_num_samples
        widths = [d for *_, d in self.inputs]
        sums = examples * sum(TOKENS.values()) * sum(d**2 for d in widths)
        found = {
            "features: forward passes": sum(
                self.forward_seconds(examples, self.dtype, self.part(task)) for task in EXAMPLES
            ),
            "features: token sums in float64": sums / (self.gpu.fp64 * 1e12 * self.gpu.share),
            "features: solving for A, on the host": tasks * sum(map(solve_seconds, widths)),
            "merging: reading the adapters": tasks * size(trained(self.model)) / DISK,
            "scoring: reading the base, each task": tasks * size(frozen(self.model)) / DISK,
        }
        for dtype in (torch.float32, torch.bfloat16):
            found[f"scoring: a row of the table in {_named(dtype)}"] = sum(
                self.forward_seconds(validation, dtype, self.part(task))
                for task, (_, validation) in EXAMPLES.items()
            )
        return found

    # -- together

    def verdict(self) -> dict[str, float]:
        """Totals of a GPU in GiB, with these flags and with others."""
        mean = max(TOKENS.values())
        return {
            "there is": self.gpu.gib,
            "training": total(self.training(True)),
            "training without --gradient-checkpoint": total(self.training(False)),
            "token statistics": total(self.collecting("token", self.length)),
            f"token statistics at {mean} tokens": total(self.collecting("token", mean)),
            "--features sample or mean": total(self.collecting("sample", self.length)),
            "scoring in float32": total(self.scoring(torch.float32)),
            "scoring in bfloat16": total(self.scoring(torch.bfloat16)),
        }

    def record(self) -> dict[str, Any]:
        """All of it, as it stands in the results."""
        memory = {
            "training": self.training(self.args.gradient_checkpoint),
            "statistics": self.statistics(),
            "merging": self.merging(),
            "scoring": self.scoring(self.eval_dtype),
        }
        return {
            "gpus": f"{self.args.gpus} x {self.gpu.title}",
            "verdict": self.verdict(),
            "largest_batch": {
                "with --gradient-checkpoint": self.largest_batch(True),
                "without": self.largest_batch(False),
            },
            "memory": {part: [asdict(each) for each in rows] for part, rows in memory.items()},
            "step": _rounded(self.step()),
            "hours": self.hours(),
            "seconds": _rounded(self.seconds()),
        }

    def overview(self) -> dict[str, float]:
        """Totals in GiB."""
        disk = sum(moment_size(self.args.max_num_samples * self.length, d) for *_, d in self.inputs)
        return {
            "frozen weights": round(size(frozen(self.model)) / GIB, 2),
            "training": total(self.training(False)),
            "with --gradient-checkpoint": total(self.training(True)),
            "token statistics": total(self.collecting("token", self.length)),
            "these on disk, 8 tasks": round(8 * disk / GIB, 2),
            "scoring in float32": total(self.scoring(torch.float32)),
            "scoring in bfloat16": total(self.scoring(torch.bfloat16)),
        }


def _rounded(numbers: Mapping[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.4g}") for name, value in numbers.items()}


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ------------------------------------------------------------------- the document


def table(header: Sequence[str], rows: Iterable[Sequence[Any]], numbers: str = "") -> str:
    """A Markdown table; `numbers` has an "r" for each column that is set to the right."""
    marks = ["---:" if mark == "r" else "---" for mark in numbers.ljust(len(header))]
    lines = [header, marks, *rows]
    return "\n".join("| " + " | ".join(map(_text, line)) + " |" for line in lines)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    if not isinstance(value, float):
        return str(value)
    if 0 < value < 0.001:
        return "< 0.001"
    digits = 2 - math.floor(math.log10(value)) if value else 0  # three that count
    return f"{value:.{min(3, max(0, digits))}f}"


PARTS = {
    "training": "training, on each GPU, GiB",
    "statistics": "statistics of the features, GiB",
    "merging": "merging, on the host, GiB",
    "scoring": "scoring, on one GPU, GiB",
}


def render(plans: Mapping[str, Mapping[str, Any]]) -> str:
    """Records of `Plan` side by side, as Markdown."""
    right = " " + "r" * len(plans)
    verdicts = {title: plan["verdict"] for title, plan in plans.items()}
    parts = [table(("on one GPU, GiB", *plans), side_by_side(verdicts, _bold), right)]
    batches = {title: plan["largest_batch"] for title, plan in plans.items()}
    parts.append(
        table(("largest --per-device-train-bsz that fits", *plans), side_by_side(batches), right)
    )
    for part, header in PARTS.items():
        rows = {title: plan["memory"][part] for title, plan in plans.items()}
        sizes = {title: {each["what"]: each["gib"] for each in rows[title]} for title in plans}
        if part in ("training", "scoring"):
            for each in sizes.values():
                each["**in all**"] = sum(each.values())
        how = {each["what"]: each["how"] for part_rows in rows.values() for each in part_rows}
        lines = [[*line, how.get(line[0], "")] for line in side_by_side(sizes)]
        parts.append(table((header, *plans, "from"), lines, right))
    for unit, header in {"steps": "steps", "hours": "hours", "longest": "hours at most"}.items():
        tasks = {
            title: {task: each[unit] for task, each in plan["hours"].items()}
            for title, plan in plans.items()
        }
        for each in tasks.values():
            each["**all**"] = sum(each.values())
        parts.append(table((header, *plans), side_by_side(tasks), right))
    for part, header in {"step": "a training step", "seconds": "seconds"}.items():
        numbers = {title: plan[part] for title, plan in plans.items()}
        parts.append(table((header, *plans), side_by_side(numbers), right))
    return "\n\n".join(parts)


def side_by_side(
    columns: Mapping[str, Mapping[str, Any]], show: Callable[[str, Any, Mapping], Any] | None = None
) -> list[list[Any]]:
    """A line for each name that a column has, in order; `show(name, value, column)` is a cell."""
    longest = max(columns.values(), key=len)
    return [
        [name]
        + [
            (show(name, each[name], each) if show else each[name]) if name in each else ""
            for each in columns.values()
        ]
        for name in longest
    ]


def _bold(name: str, value: float, column: Mapping[str, float]) -> str:
    """Bold is what does not fit."""
    return f"**{_text(value)}**" if value > column["there is"] else _text(value)


def render_check(check: Iterable[Mapping[str, Any]]) -> str:
    """What `measured.checks` found as Markdown."""
    rows = [
        (each["what"], each["planned"] / MIB, each["found"] / MIB, each["how"]) for each in check
    ]
    return table(("what", "planned, MiB", "found, MiB", "found in"), rows, " rr")


def sentence(title: str, plan: Mapping[str, Any]) -> str:
    """What fits, and what makes the rest fit."""
    verdict = plan["verdict"]

    def judged(name: str) -> str:
        fits = verdict[name] <= verdict["there is"]
        return f"{_text(verdict[name])} {'fits' if fits else '**does not fit**'}"

    parts = [
        f"{what} {judged(what)} ({otherwise}: {judged(name)})"
        for what, otherwise, name in (
            ("training", "without checkpointing", "training without --gradient-checkpoint"),
            ("token statistics", "of samples", "--features sample or mean"),
            ("scoring in bfloat16", "in float32", "scoring in float32"),
        )
    ]
    hours, most = (
        sum(task[name] for task in plan["hours"].values()) for name in ("hours", "longest")
    )
    return (
        f"- **{title}** ({plan['gpus']}, {verdict['there is']} GiB each): {'; '.join(parts)}."
        f" Training all eight tasks takes {hours:.1f} hours, {most:.1f} at most."
    )


def render_all(results: Mapping[str, Any], check: Sequence[Mapping[str, Any]]) -> str:
    """The section of benchmarks/README.md."""
    settings, backbones = results["settings"], results["backbones"]
    commands = "\n".join(f"python benchmarks/plan.py {each['flags']}" for each in settings.values())
    cards = [[*asdict(gpu).values()] for gpu in GPUS.values()]
    found = ", ".join(f"{name} {each}" for name, each in results["versions"].items())
    rows = [[name, *each.values()] for name, each in backbones.items()]
    parts = [
        HEADING,
        INTRODUCTION.format(versions=found),
        "\n".join(map(sentence, settings, settings.values())),
        NOTES,
        "Every backbone, on one GPU, 64 x 128 tokens, rank 8 on q and v:",
        table(("GiB", *next(iter(backbones.values()))), rows, " rrrrrrr"),
        f"The settings:\n\n```bash\n{commands}\n```",
        render(settings),
        f"### Assumptions\n\n{ASSUMPTIONS}",
        table(CARD, cards, " rrrrrr"),
        f"### Checked\n\n{CHECKED}",
        render_check(check),
    ]
    return "\n\n".join(parts) + "\n"


CARD = ("GPU", "GiB", "bfloat16", "float32", "float64", "GB/s", "share achieved")
INTRODUCTION = """\
```bash
python benchmarks/plan.py --output benchmarks/results/plan.json --document benchmarks/README.md
python benchmarks/plan.py --check --output benchmarks/results/plan_check.json
python benchmarks/plan.py --backbone llama3-8b --gpu rtx4090 --gradient-checkpoint
```

No GPU and no weights were at hand: this is computed, by the code and the libraries that would run.
A model is built on torch's meta device, which has shapes but no data; a step's operations run there
one by one as on a GPU (bfloat16 by autocast, the memory-efficient attention kernel), and after each
it is counted what tensors are alive. "Checked" has how near that is to real tensors on a CPU.
Memory is for full batches of the longest examples; times rest on assumed shares of the GPU's speed
and are rough. Counted with {versions}. In GiB:"""

NOTES = """\
What to make of it:

- **24 GB are enough to train Llama-3-8B** with `--gradient-checkpoint`, and no sharding is needed.
  `torchrun --nproc-per-node 4 train_glue.py` (the last column) is the fastest on four cards, or a
  task of its own for each card (`CUDA_VISIBLE_DEVICES`). FSDP (`accelerate launch
  --config_file hparams/fsdp.yaml`) makes room for batches of 128 instead of 64 on each, or for no
  checkpointing, and at GLUE's lengths waits for the weights. Before it shards, and while statistics
  are collected, each GPU holds all weights.
- Token statistics of Llama-3-8B do not fit on an A10 (an RTX 4090 has just enough room for them
  with `--per-device-eval-bsz 8`): take `--features sample`, or make them where there is room, which
  may be a host without a GPU, with `--feature-bank DIR --only-features --dtype bfloat16`. They take
  up to 4 GiB of disk a task, in the cache or the bank.
- Scoring merges of Llama-3-8B fits on 24 GB with `--eval-dtype bfloat16`: one model is on the GPU
  at a time.
- Merging itself runs on the host, a module at a time, and needs neither a GPU nor the base."""

ASSUMPTIONS = f"""\
- Peaks of dense products in TFLOP/s and bandwidths are the published ones, GiB about what torch
  reports. Of the peak the last column's share is achieved, of the bandwidth {BANDWIDTH_SHARE:.0%};
  products and all else follow each other; an operation takes {LAUNCH * 1e6:.0f} µs of the host.
- Beside the tensors: {CONTEXT:g} GiB of context and workspaces, and {FRAGMENTATION:.0%} of all that
  is allocated for what the allocator cannot use.
- Every batch has padding, so attention has a mask. Without one torch takes the flash kernel, which
  keeps as much, and Llama's keys and values are not copied for all heads.
- Hours are at GLUE's mean lengths, as batches are of alike lengths; "at most": all examples have
  `--max-seq-len` tokens. Training sets are GLUE's, less the tenth that selects the epoch, at most
  {MOST_TRAIN:,} examples. The evaluations are in it, loading and saving are not.
- FSDP: weights are sharded and gathered block by block, one block ahead and twice a step, over
  {LINK / 1e9:.0f} GB/s. They stay in `--dtype`, as they do with accelerate 1.14 and newer; 1.12
  makes the shards float32. Adapters are whole on each GPU; the batch is that of one GPU.
- The disk reads {DISK / 1e9:g} GB/s. Solving for A was measured on two CPU cores for d = 1024 and
  4096 (README.md, "Which start"); in between a power of d."""

CHECKED = """\
Planned on the meta device, and found on a CPU: MiniLM and a small random Llama in float32, with
attention by torch's own formula on both sides; malloc maps every tensor for itself, so that
resident memory shows what is alive. Tests compare tiny models to the byte, also in bfloat16. Not
checked, since no GPU was there: its kernels, its allocator, its speed, and FSDP."""


def versions() -> dict[str, str]:
    """Of what the counts depend on; of torch's builds any."""
    return {name: version(name).partition("+")[0] for name in ("torch", "transformers", "peft")}


def all_results(parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Every setting, and every backbone with the flags' defaults."""
    settings = {
        title: {"flags": flags, **Plan(parser.parse_args(shlex.split(flags))).record()}
        for title, flags in SETTINGS.items()
    }
    backbones = {name: Plan(parser.parse_args(["--backbone", name])).overview() for name in CONFIGS}
    return {"versions": versions(), "settings": settings, "backbones": backbones}


def arguments() -> argparse.ArgumentParser:
    """The flags: train_glue.py's, where it has them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--backbone", choices=CONFIGS, help="without it: the settings of the document")
    add("--gpu", choices=GPUS, default="a100-80")
    add("--gpus", type=int, default=1, help="more than one: FSDP shards the weights")
    add("--whole", action="store_true", help="no, each of several GPUs has all weights (DDP)")
    add("--per-device-train-bsz", type=int, default=64)
    add("--per-device-eval-bsz", type=int, default=64)
    add("--max-seq-len", type=int, default=128)
    add("--rank", type=int, default=8)
    add("--block", default="qv", help="letters of q, k and v")
    add("--tasks", type=int, default=8, help="how many are merged")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    add("--eval-dtype", choices=("bfloat16", "float32"), default="float32")
    add("--gradient-checkpoint", action="store_true")
    add("--epochs", type=int, default=10)
    add("--load-epochs", metavar="FILE", help="JSON {task: epochs}")
    add("--max-num-samples", type=int, default=100, help="examples a task for the statistics")
    add("--check", action="store_true", help="plan and measure on this CPU instead")
    add("--output", type=Path, metavar="FILE", help="write the numbers as JSON")
    add("--document", type=Path, metavar="FILE", help="replace the section of this Markdown file")
    add("--threads", type=int, default=2)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Read the flags, plan or check, print, write."""
    parser = arguments()
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    results: Any
    if args.check:
        from measured import checks

        results = [asdict(each) for each in checks()]
        print(render_check(results))
    elif args.backbone:
        results = Plan(args).record()
        print(render({args.backbone: results}))
    else:
        results = all_results(parser)
        section = render_all(results, json.loads((RESULTS / "plan_check.json").read_text()))
        print(section)
        if args.document:
            before = args.document.read_text().partition(HEADING)[0]
            args.document.write_text(before + section)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
