"""What `counting.py` counts, beside this machine's memory: `plan.py --check`.

On the CPU, with the embedded model and a small random Llama; needs Linux with glibc.
"""

from __future__ import annotations

import ctypes
import gc
import resource
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from counting import (
    CONFIGS,
    OnGpu,
    adapted,
    collecting_size,
    count_forward,
    count_merge,
    count_step,
    llama,
    logits,
    merge_one,
    moment_size,
    optimizer_size,
    prepare_step,
    pretrained,
    random_updates,
    size,
    solving_size,
    trained,
)
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from osrm.adapters import WEIGHTS, save_adapter
from osrm.backbones import find_backbone, load_model, load_tokenizer, projections
from osrm.checkpoints import read_tensor, tensor_files
from osrm.features import FeatureFile, starts, task_features
from osrm.glue import TASKS
from osrm.moments import Moment
from osrm.runs import peak_memory, reset_peak_memory

MIB, GIB = 2**20, 2**30
RANK = 8
M_MMAP_THRESHOLD = -3
"""glibc's number of this setting of malloc."""
STEPS = {
    "MiniLM": CONFIGS["minilm"],
    "a Llama (d = 512, 4 layers)": llama(1000, 512, 4, 16, 32, 1792),
}
MEMORY = "resident memory"


@dataclass(frozen=True)
class Check:
    """A number of bytes, planned and found."""

    what: str
    planned: int
    found: int
    how: str


def checks() -> Iterator[Check]:
    """Plan, then measure."""
    # Every tensor is a mapping of its own, so that resident memory is what is alive.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)
    yield from check_steps()
    yield from check_minilm()
    yield from check_solving()
    yield from check_merging()


def resident() -> int:
    """Bytes of this process's resident memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def growth(function: Callable[[], Any]) -> int:
    """By how many bytes resident memory grows, at most, while the function runs."""
    function()  # what libraries allocate once
    gc.collect()
    reset_peak_memory()
    before = resident()
    function()
    return round(peak_memory() * GIB) - before


def check_steps(batch: int = 16, length: int = 128) -> Iterator[Check]:
    """Training steps in float32, attention by torch's own formula."""
    for name, config in STEPS.items():
        for checkpoint in (False, True):
            plan = count_step(
                adapted(config, torch.float32, "qv", RANK),
                *(batch, length, checkpoint, partial(OnGpu, False, kernels=False)),
            )
            kept, peak = measured_step(config, batch, length, checkpoint)
            what = f"{name}, {batch} x {length} tokens{', checkpointed' if checkpoint else ''}"
            yield Check(f"{what}: kept for the backward pass", plan.kept, kept, MEMORY)
            yield Check(f"{what}: peak of a step", plan.peak, peak, MEMORY)


def measured_step(config: Any, batch: int, length: int, checkpoint: bool) -> tuple[int, int]:
    """Growth of resident memory between forward and backward, and at the peak."""
    way = partial(sdpa_kernel, SDPBackend.MATH)
    model = adapted(config, torch.float32, "qv", RANK, "cpu")
    prepare_step(model, checkpoint, way)
    kept = 0

    def step(batch: int, length: int) -> None:
        nonlocal kept
        with way():
            loss = F.cross_entropy(logits(model, batch, length), torch.zeros(batch).long())
        kept = resident()
        loss.backward()

    step(2, 8)
    reset_peak_memory()
    before = resident()
    step(batch, length)
    return kept - before, round(peak_memory() * GIB) - before


def check_minilm() -> Iterator[Check]:
    """Weights, adapters, optimizer and statistics of the embedded model."""
    config, backbone = CONFIGS["minilm"], find_backbone("minilm")
    tokenizer = load_tokenizer(backbone)
    base = load_model(backbone, TASKS["mnli"].labels, tokenizer, torch.float32)
    body = pretrained(config, torch.float32).base_model
    stored = [read_tensor(file, name) for name, file in tensor_files(Path(backbone.path)).items()]
    yield Check("MiniLM's weights", size([*body.parameters()]), size(stored), "its file")
    with tempfile.TemporaryDirectory() as folder:
        for features in ("token", "sample", "mean"):
            yield from check_statistics(base, features, Path(folder) / features)
        model = adapted(config, torch.float32, "qv", RANK, "cpu")
        plan = trained(adapted(config, torch.float32, "qv", RANK))
        save_adapter(model, Path(folder))
        stored = [*load_file(Path(folder) / WEIGHTS).values()]
        yield Check("its adapter and head", size(plan), size(stored), "its file")
    optimizer = torch.optim.AdamW(trained(model))
    logits(model, 2, 8).sum().backward()
    optimizer.step()
    states = [each for state in optimizer.state.values() for each in state.values()]
    yield Check("AdamW's states", optimizer_size(plan), size(states), "its tensors")


def check_statistics(base: Any, features: str, path: Path) -> Iterator[Check]:
    """One task's statistics, of 100 examples of 128 tokens: while they are collected, on disk."""
    batch, length, samples, d = 64, 128, 100, base.config.hidden_size
    sizes = (batch, samples - batch)
    masks = [torch.ones(each, length, dtype=torch.long) for each in sizes]
    # Of different tokens, as the first vectors must not be the same as the others.
    batches = [{"input_ids": (5 * each).cumsum(1), "attention_mask": each} for each in masks]
    settings = {"task": "none", "features": features, "count_padding": False}
    modules = projections(base, "qv", RANK)
    with sdpa_kernel(SDPBackend.MATH):
        peak = growth(lambda: task_features(settings, base, modules, batches, path))
    found = FeatureFile(path).tensors
    vectors = {"token": samples * length, "sample": samples, "mean": 1}[features]
    plan = len(found) * moment_size(vectors, d)
    what = f"MiniLM's {features} statistics of {samples} examples"
    yield Check(f"{what}: on disk", plan, size([*found.values()]), "its file")
    forward, inputs = count_forward(
        pretrained(CONFIGS["minilm"], torch.float32),
        *(batch, length, partial(OnGpu, False, kernels=False), modules),
    )
    most = collecting_size(forward, [each.shape for each in inputs], features, samples, 4)
    yield Check(f"{what}: collecting", most, peak, MEMORY)


def check_solving(d: int = 2048, tasks: int = 8) -> Iterator[Check]:
    """From the statistics to A."""
    generator = torch.Generator().manual_seed(0)
    names = [str(task) for task in range(tasks)]
    moments = {
        name: {"module": Moment.of(torch.randn(2 * d, d, generator=generator))} for name in names
    }
    widths, leaders = {"module": d}, {"module": "module"}
    peak = growth(lambda: starts("analytical", names, widths, RANK, 0, moments, leaders, names))
    plan = solving_size(tasks, 2 * d, d) - tasks * moment_size(2 * d, d)
    yield Check(f"solving for A, d = {d}, beside the statistics", plan, peak, MEMORY)


def check_merging(d: int = 2048, tasks: int = 8) -> Iterator[Check]:
    """One module of eight tasks."""
    for method in ("tsv", "ties", "emr", "fisher", "regmean"):
        vectors = random_updates({"module": (d, d)}, RANK, [*map(str, range(tasks))])
        peak = growth(partial(merge_one, method, vectors))
        plan = count_merge(method, {(d, d): 1}, RANK, tasks).peak
        yield Check(f"{method}, {tasks} tasks, a module of {d} x {d}", plan, peak, MEMORY)
