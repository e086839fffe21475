"""What the benchmarks share: flags, timing, peak memory, results, a random model's sizes."""

from __future__ import annotations

import argparse
import os
import platform
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from transformers import RobertaConfig

from osrm.files import write_json
from osrm.measure import environment, peak_memory, reset_peak_memory

TASKS = ("mrpc", "qnli", "qqp", "rte", "sst2", "mnli", "cola", "stsb")


def flags(doc: str) -> argparse.ArgumentParser:
    """A parser of the flags that every benchmark has."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="a JSON file for all numbers")
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags; from here on torch has --threads threads."""
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    return args


def report(args: argparse.Namespace, table: str, numbers: Mapping[str, Any]) -> None:
    """Print the table; write the numbers to --output, with the flags and the machine."""
    print(f"\n{machine()}\n\n{table}")
    if args.output:
        shown = {name: value for name, value in vars(args).items() if name != "output"}
        record = {"flags": shown, **numbers, "machine": machine(), "environment": environment()}
        write_json(args.output, record)


def table(columns: Mapping[str, str], records: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table of {title: format of the cell}, with a row for each record."""
    lines = [[*columns], ["---", *["---:"] * (len(columns) - 1)]]
    lines += [[cell.format(**record) for cell in columns.values()] for record in records]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine() -> str:
    """What the numbers depend on beside the code."""
    cpuinfo = Path("/proc/cpuinfo")
    models = [line for line in cpuinfo.read_text().splitlines() if "model name" in line]
    name = models[0].partition(": ")[2] if models else platform.processor()
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    load = ", ".join(f"{average:.1f}" for average in os.getloadavg())
    return (
        f"{name}, {os.cpu_count()} cores{gpu}, {torch.get_num_threads()} threads,"
        f" torch {torch.__version__}, load averages {load}"
    )


@dataclass
class Cost:
    """Seconds, and the peak memory in GiB: of the GPU, or the process's resident memory."""

    seconds: float = 0.0
    peak: float = 0.0


@contextmanager
def measured(device: str = "cpu") -> Iterator[Cost]:
    """Yield a cost that is filled in when the block, and the device's work, ends."""
    cost, wait = Cost(), torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    reset_peak_memory()
    begin = time.perf_counter()
    yield cost
    wait()
    cost.seconds = time.perf_counter() - begin
    cost.peak = peak_memory("cuda") if device == "cuda" else resident("VmHWM")


def in_new_process(threads: int, function: Callable[..., Any], *arguments: Any) -> tuple[Any, Cost]:
    """What the function returns in a process of its own, and the cost of that process.

    The peak is that of the process itself or, if that is higher, of a program which it ran.
    """
    begin = time.perf_counter()
    spawn = get_context("spawn")
    with ProcessPoolExecutor(1, spawn, torch.set_num_threads, (threads,)) as pool:
        value, peak = pool.submit(_with_peak, function, arguments).result()
    return value, Cost(time.perf_counter() - begin, peak)


def _with_peak(function: Callable[..., Any], arguments: Sequence[Any]) -> tuple[Any, float]:
    value = function(*arguments)
    # The kernel's own figure for this process (RUSAGE_SELF) starts at the peak of its parent.
    programs = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    return value, max(resident("VmHWM"), programs)


def resident(field: str) -> float:
    """GiB of this process's resident memory: now (VmRSS), or at its peak (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 2**20


def roberta_config(width: int = 1024, layers: int = 24, **changes: Any) -> RobertaConfig:
    """RoBERTa-large, or a RoBERTa of another width, depth, ..."""
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": 4 * width}
    sizes |= {"num_attention_heads": max(1, width // 64), "vocab_size": 50265}
    sizes |= {"max_position_embeddings": 514, "type_vocab_size": 1, **changes}
    return RobertaConfig(**sizes)
