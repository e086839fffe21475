"""How long merging takes, and how much memory: ours beside PEFT's, and at Llama's size.

    python benchmarks/merging.py llama     # 8 adapters of Llama-3-8B's shapes, rank 16, bfloat16
    python benchmarks/merging.py roberta   # 8 adapters of RoBERTa-large's shapes, beside peers

Every merge runs in a process of its own, whose seconds and peak memory the table has. The time of
the merge itself is that of reading the adapters, merging and writing the result; PEFT's base model
is in memory before it begins. mergekit, if it is installed (mergekit-yaml), is timed as a whole
only. Adapters and base model are random: nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
TASKS = ("mrpc", "qnli", "qqp", "rte", "sst2", "mnli", "cola", "stsb")

OURS = {
    "llama": ("task_arithmetic", "ties", "emr"),
    "roberta": ("task_arithmetic", "ties", "emr", "tsv"),
}
PEERS = {
    "peft": ("cat", "linear", "svd", "ties", "ties_svd"),
    "mergekit": ("task_arithmetic", "ties"),
}


def shapes(name: str, layers: int) -> dict[str, tuple[int, int]]:
    """{layer: (out, in)} of the query and value projections."""
    if name == "llama":
        prefix = "model.layers.{}.self_attn"
        projections = {"q_proj": (4096, 4096), "v_proj": (1024, 4096)}
    else:
        prefix = "roberta.encoder.layer.{}.attention.self"
        projections = {"query": (1024, 1024), "value": (1024, 1024)}
    return {
        f"{prefix.format(layer)}.{projection}": shape
        for layer in range(layers)
        for projection, shape in projections.items()
    }


def write_adapters(name: str, layers: int, rank: int, directory: Path) -> None:
    """Random adapters as PEFT saves them, and the load_model_path.json that names them."""
    import torch
    from safetensors.torch import save_file

    for number, task in enumerate(TASKS):
        generator = torch.Generator().manual_seed(number)
        tensors = {}
        for layer, (out, width) in shapes(name, layers).items():
            A = torch.randn(rank, width, generator=generator) / width**0.5
            B = torch.randn(out, rank, generator=generator) * 0.01
            tensors[f"base_model.model.{layer}.lora_A.weight"] = A.bfloat16()
            tensors[f"base_model.model.{layer}.lora_B.weight"] = B.bfloat16()
        config = {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": 2 * rank,
            "target_modules": ["q_proj", "v_proj"] if name == "llama" else ["query", "value"],
            "base_model_name_or_path": name,
        }
        (directory / task).mkdir(parents=True)
        save_file(tensors, directory / task / "adapter_model.safetensors")
        (directory / task / "adapter_config.json").write_text(json.dumps(config))
    paths = {task: str(directory / task) for task in TASKS}
    (directory / "load_model_path.json").write_text(json.dumps(paths))


def ours(method: str, directory: Path, output: Path) -> float:
    """merge.py --no-eval; seconds."""
    from osrm.commands.merge import run
    from osrm.config import MergeConfig

    config = MergeConfig(
        load_model_path=str(directory / "load_model_path.json"),
        methods=[method],
        hparams=str(ROOT / "hparams" / "merge.json"),
        no_eval=True,
        output_dir=str(output),
    )
    begin = time.perf_counter()
    run(config)
    return time.perf_counter() - begin


def peft(combination: str, directory: Path, output: Path, layers: int) -> float:
    """PEFT's add_weighted_adapter on a random base model; seconds of merging and writing."""
    from peft import PeftModel

    model = roberta(layers)
    begin = time.perf_counter()
    adapted = PeftModel.from_pretrained(model, directory / TASKS[0], adapter_name=TASKS[0])
    for task in TASKS[1:]:
        adapted.load_adapter(directory / task, adapter_name=task)
    adapted.add_weighted_adapter(
        list(TASKS),
        [0.3] * len(TASKS),
        "merged",
        combination_type=combination,
        density=0.2 if combination.startswith("ties") else None,
    )
    adapted.save_pretrained(output, selected_adapters=["merged"])
    return time.perf_counter() - begin


def roberta(layers: int) -> Any:
    """RoBERTa-large with random weights in bfloat16."""
    import torch
    from transformers import RobertaConfig, RobertaForMaskedLM

    config = RobertaConfig(
        vocab_size=50265,
        hidden_size=1024,
        num_hidden_layers=layers,
        num_attention_heads=16,
        intermediate_size=4096,
        max_position_embeddings=514,
    )
    return RobertaForMaskedLM(config).to(torch.bfloat16)


def mergekit(method: str, directory: Path, layers: int) -> list[str]:
    """The command of a merge with mergekit; writes base model and settings first."""
    base = directory / "base"
    if not base.exists():
        roberta(layers).save_pretrained(base)
    knobs = {"weight": 0.3, **({"density": 0.2} if method == "ties" else {})}
    settings = {
        "merge_method": method,
        "base_model": str(base),
        "models": [{"model": f"{base}+{directory / task}", "parameters": knobs} for task in TASKS],
        "dtype": "float32",
    }
    path = directory / f"{method}.yml"
    path.write_text(json.dumps(settings))  # JSON is YAML
    output = directory / f"mergekit-{method}"
    cache = directory / f"mergekit-{method}-cache"
    return ["mergekit-yaml", str(path), str(output), "--lora-merge-cache", str(cache), "--quiet"]


def child(arguments: argparse.Namespace) -> None:
    """One merge in this process; prints its seconds."""
    import torch

    torch.set_num_threads(arguments.threads)
    directory = Path(arguments.directory)
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        output = Path(folder) / "merged"
        if arguments.tool == "ours":
            seconds = ours(arguments.method, directory, output)
        else:
            seconds = peft(arguments.method, directory, output, arguments.layers)
        size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    print(json.dumps({"seconds": seconds, "gib": size / 2**30}))


def measured(
    tool: str, method: str, arguments: argparse.Namespace, directory: Path
) -> dict[str, float]:
    """Run one merge in a process of its own: its seconds and those of the whole, peak memory."""
    command = [sys.executable, __file__, "child", tool, method, str(directory)]
    command += ["--layers", str(arguments.layers), "--threads", str(arguments.threads)]
    if tool == "mergekit":
        command = mergekit(method, directory, arguments.layers)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(arguments.threads)}
    begin = time.perf_counter()
    with (directory / "output.txt").open("w+") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, text=True, env=environment
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        whole = time.perf_counter() - begin
        output.seek(0)
        printed = output.read()
    if process.returncode:
        raise SystemExit(f"{tool} {method} failed:\n{printed}")
    found = json.loads(printed.splitlines()[-1]) if tool != "mergekit" else {}
    return {**found, "whole": whole, "peak": usage.ru_maxrss / 2**20}


def parent(arguments: argparse.Namespace) -> None:
    """Write the adapters, run every merge, print the table."""
    with tempfile.TemporaryDirectory(dir=arguments.directory) as folder:
        directory = Path(folder)
        write_adapters(arguments.part, arguments.layers, arguments.rank, directory)
        cases = [("ours", method) for method in OURS[arguments.part]]
        if arguments.part == "roberta":
            peers = [tool for tool in PEERS if tool == "peft" or shutil.which("mergekit-yaml")]
            cases += [(tool, method) for tool in peers for method in PEERS[tool]]
        print(
            f"{len(TASKS)} adapters, {arguments.layers} layers, rank {arguments.rank},"
            f" {arguments.threads} threads\n"
        )
        print("| tool | method | merge, s | process, s | peak memory, GiB | result, GiB |")
        print("|---|---|---:|---:|---:|---:|")
        for tool, method in cases:
            found = measured(tool, method, arguments, directory)
            merge, size = (
                f"{found[name]:.2f}" if name in found else "" for name in ("seconds", "gib")
            )
            print(
                f"| {tool} | {method} | {merge} | {found['whole']:.1f} | {found['peak']:.2f} |"
                f" {size} |",
                flush=True,
            )


def main(argv: Sequence[str] | None = None) -> None:
    """Read the flags and run one part."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = parser.add_subparsers(dest="part", required=True)
    for name, layers, rank in (("llama", 32, 16), ("roberta", 24, 8)):
        part = parts.add_parser(name, help=f"{len(TASKS)} adapters of its shapes")
        part.set_defaults(run=parent)
        part.add_argument("--layers", type=int, default=layers)
        part.add_argument("--rank", type=int, default=rank)
        part.add_argument("--directory", help="for adapters and results; default: the system's")
        part.add_argument("--threads", type=int, default=2)
    one = parts.add_parser("child", help="one merge, in this process")
    one.set_defaults(run=child)
    for name in ("tool", "method", "directory"):
        one.add_argument(name)
    one.add_argument("--layers", type=int, default=24)
    one.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args(argv)
    arguments.run(arguments)


if __name__ == "__main__":
    main()
