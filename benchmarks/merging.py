"""How long merging takes, and how much memory: ours beside PEFT's, and at Llama's size.

    python benchmarks/merging.py llama     # 8 adapters of Llama-3-8B's shapes, rank 16, bfloat16
    python benchmarks/merging.py roberta   # 8 adapters of RoBERTa-large's shapes, beside peers

Every merge runs in a process of its own. "Merge" is the time to read the adapters, to merge and to
write the result. PEFT's base model is in memory before that. mergekit, if it is installed
(mergekit-yaml), is timed as a whole. Adapters and base model are random: nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import common
import torch
from common import TASKS, in_new_process, measured, roberta_config
from safetensors.torch import save_file

ROOT = Path(__file__).parent.parent
LAYERS, RANK = {"llama": 32, "roberta": 24}, {"llama": 16, "roberta": 8}
CASES = {
    "llama": {"ours": ("task_arithmetic", "ties", "emr", "iso_cts")},
    "roberta": {
        "ours": ("task_arithmetic", "ties", "emr", "tsv", "iso_cts"),
        "peft": ("cat", "linear", "svd", "ties", "ties_svd"),
        "mergekit": ("task_arithmetic", "ties"),
    },
}
"""{model: {tool: its methods}}"""


def shapes(model: str, layers: int) -> dict[str, tuple[int, int]]:
    """{module: (out, in)} of the query and value projections."""
    prefix, projections = {
        "llama": ("model.layers.{}.self_attn", {"q_proj": (4096, 4096), "v_proj": (1024, 4096)}),
        "roberta": (
            "roberta.encoder.layer.{}.attention.self",
            {"query": (1024, 1024), "value": (1024, 1024)},
        ),
    }[model]
    return {
        f"{prefix.format(layer)}.{projection}": shape
        for layer in range(layers)
        for projection, shape in projections.items()
    }


def write_adapters(modules: Mapping[str, tuple[int, int]], rank: int, directory: Path) -> None:
    """Random adapters as PEFT saves them, and the load_model_path.json that names them."""
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted({module.rpartition(".")[2] for module in modules}),
        "base_model_name_or_path": "random",
    }
    for number, task in enumerate(TASKS):
        generator = torch.Generator().manual_seed(number)
        tensors = {}
        for module, (out, width) in modules.items():
            A = torch.randn(rank, width, generator=generator) / width**0.5
            B = torch.randn(out, rank, generator=generator) / 100
            tensors[f"base_model.model.{module}.lora_A.weight"] = A.bfloat16()
            tensors[f"base_model.model.{module}.lora_B.weight"] = B.bfloat16()
        (directory / task).mkdir(parents=True)
        save_file(tensors, directory / task / "adapter_model.safetensors")
        (directory / task / "adapter_config.json").write_text(json.dumps(config))
    paths = {task: str(directory / task) for task in TASKS}
    (directory / "load_model_path.json").write_text(json.dumps(paths))


def ours(method: str, directory: Path, output: Path, layers: int = 0) -> float:
    """Seconds of merge.py --no-eval."""
    from osrm.commands.merge import run
    from osrm.config import MergeConfig

    config = MergeConfig(
        load_model_path=str(directory / "load_model_path.json"),
        methods=[method],
        hparams=str(ROOT / "hparams" / "merge.json"),
        no_eval=True,
        output_dir=str(output),
    )
    with measured() as cost:
        run(config)
    return cost.seconds


def peft(combination: str, directory: Path, output: Path, layers: int) -> float:
    """Seconds of PEFT's add_weighted_adapter, with reading and writing."""
    from peft import PeftModel

    model = roberta(layers)
    with measured() as cost:
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
    return cost.seconds


def mergekit(method: str, directory: Path, output: Path, layers: int) -> float:
    """Seconds of the whole command of mergekit; its base model and settings are written before."""
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
    command = ["mergekit-yaml", str(path), str(output), "--quiet"]
    command += ["--lora-merge-cache", str(directory / f"mergekit-{method}-cache")]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    with measured() as cost:
        subprocess.run(command, check=True, env=environment)
    return cost.seconds


TOOLS = {"ours": ours, "peft": peft, "mergekit": mergekit}


def roberta(layers: int) -> Any:
    """RoBERTa-large with random weights in bfloat16."""
    from transformers import RobertaForMaskedLM

    return RobertaForMaskedLM(roberta_config(layers=layers)).to(torch.bfloat16)


def merge_once(tool: str, method: str, directory: Path, layers: int) -> dict[str, float]:
    """Seconds of one merge, and GiB of its result."""
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        output = Path(folder) / "merged"
        seconds = TOOLS[tool](method, directory, output, layers)
        size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    return {"merge_seconds": seconds, "result_gib": size / 2**30}


def main(argv: Sequence[str] | None = None) -> None:
    """Write the adapters, run every merge, print the table."""
    parser = common.flags(__doc__)
    parser.add_argument("model", choices=CASES)
    args = common.parse(parser, argv)
    layers, rank = LAYERS[args.model], RANK[args.model]
    merges = []
    with tempfile.TemporaryDirectory() as folder:
        write_adapters(shapes(args.model, layers), rank, Path(folder))
        for tool, methods in CASES[args.model].items():
            for method in methods if tool != "mergekit" or shutil.which("mergekit-yaml") else ():
                numbers, cost = in_new_process(
                    args.threads, merge_once, tool, method, Path(folder), layers
                )
                whole = {"process_seconds": cost.seconds, "peak_gib": cost.peak}
                merges.append({"tool": tool, "method": method, **numbers, **whole})
                print(merges[-1], flush=True)
    columns = {
        "tool": "{tool}",
        "method": "{method}",
        "merge, s": "{merge_seconds:.2f}",
        "process, s": "{process_seconds:.1f}",
        "peak memory, GiB": "{peak_gib:.2f}",
        "result, GiB": "{result_gib:.2f}",
    }
    common.report(args, common.table(columns, merges), {"merges": merges})


if __name__ == "__main__":
    main()
