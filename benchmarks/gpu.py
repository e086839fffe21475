"""All that should be measured on a GPU, in one command: at most 8 minutes on an H100.

    python benchmarks/gpu.py --output benchmarks/results/gpu               # all parts
    python benchmarks/gpu.py --output DIR --parts merging llama            # some of them
    python benchmarks/gpu.py --output DIR --quick --device cpu             # toy sizes, no GPU
    python benchmarks/gpu.py --pack .gpu   # for a machine without a network: docs/speed.md

study     the study of starts: MiniLM, the embedded tasks, several runs beside each other
roberta   RoBERTa-large's size: from token ids to A, beside the release; training, beside
          run_glue.py's way with PEFT and the release's
llama     Llama-3-8B's size: a training step, the statistics of a task, the subspaces of 8 tasks
merging   eight adapters of Llama-3-8B's size: TIES, EMR, TSV and KnOTS, beside the CPU

A part that is finished has its JSON in --output, with the card's name, and is not run again. Only
the part "study" has real weights. Numbers are medians of runs that take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import common
import memory
import merging
import starts
import torch
import training
from common import TASKS, flags, measured, report, roberta_config, table
from transformers import LlamaConfig, RobertaModel

ROOT = Path(__file__).parent.parent
Rows = list[dict[str, Any]]


# -- the study of starts -----------------------------------------------------------------------


def study(args: argparse.Namespace) -> Rows:
    """One run alone, then all beside each other; each is train_glue.py and merge.py."""
    import yaml

    setting = yaml.safe_load((ROOT / "reproduce/studies/embedded.yaml").read_text())
    inits, seeds = ("gaussian", "analytical", "contrastive"), (42, 43, 44, 45)
    train = f"{setting['flags']} {setting['train']} --lr 2e-3 --tasks {' '.join(setting['tasks'])}"
    merge = f"{setting['merge']} --methods task_arithmetic ties emr tsv --device {args.device}"
    merge += f" --search {' '.join(map(str, setting['scales']))}"
    if args.quick:
        inits, seeds = inits[::2], seeds[:1]
        train = "--backbone minilm --tasks mrpc stsb --epochs 1 --lr 2e-3 --max-train-samples 32"
        train += " --max-eval-samples 16 --max-test-samples 16 --max-num-samples 4"
        merge = f"--methods task_arithmetic --device {args.device}"
    work = args.output / "work"
    runs = [(init, seed) for seed in seeds for init in inits]

    def run(init: str, seed: int) -> dict[str, Any]:
        folder = work / f"{init}-{seed}"
        flags = [*shlex.split(train), "--init", init, "--seed", str(seed)]
        begin = time.perf_counter()
        command("train_glue.py", *flags, "--output-dir", str(folder), "--resume")
        trained = time.perf_counter()
        (paths,) = folder.glob("load_model_path-*.json")
        where = ["--load-model-path", str(paths), "--output-dir", str(folder / "merged")]
        command("merge.py", *shlex.split(merge), *where, "--overwrite")
        rows = json.loads((folder / "merged/results.json").read_text())["rows"]
        return {
            "what": f"{init}, seed {seed}",
            "seconds": time.perf_counter() - begin,
            "training": trained - begin,
            "averages": {row["name"]: row["average"] for row in rows},
            "scores": {row["name"]: row["scores"] for row in rows},
        }

    def command(script: str, *flags: str) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        if args.device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        done = subprocess.run(
            [sys.executable, str(ROOT / script), *flags],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"{script} {shlex.join(flags)}:\n{done.stderr[-3000:]}")

    work.mkdir(parents=True, exist_ok=True)
    alone = {**run(*runs[0]), "what": "one run alone"}
    begin = time.perf_counter()
    with ThreadPoolExecutor(args.jobs) as pool:
        rows = [*pool.map(run, *zip(*runs[1:]))]
    seconds = time.perf_counter() - begin
    beside = {"what": f"{len(rows)} runs, {args.jobs} at a time", "seconds": seconds}
    return [alone, *rows, {**beside, "ratio": alone["seconds"] * len(rows) / seconds}]


# -- RoBERTa-large -----------------------------------------------------------------------------


def roberta(args: argparse.Namespace) -> Rows:
    """From token ids to A; then training."""
    width, layers, samples, examples = (64, 2, 2, 16) if args.quick else (1024, 24, 100, 640)
    found: dict[str, Rows] = {}
    for _ in range(args.repeats):
        for run in starts.both_procedures(width, layers, samples, ["bfloat16"], args.device):
            found.setdefault(f"token ids to A: {run['procedure']}", []).append(run)
    rows = medians(found, "seconds", "features", "subspaces", "peak")
    rows[1]["ratio"] = rows[1]["seconds"] / rows[0]["seconds"]
    with tempfile.TemporaryDirectory() as folder:
        backbone = random_roberta(Path(folder), width, layers)
        rows += training_rows(args, backbone, examples)
    return rows


def random_roberta(folder: Path, width: int, layers: int) -> str:
    """A checkpoint of random weights that reads the embedded model's token ids."""
    from osrm.backbones import find_backbone, load_tokenizer

    load_tokenizer(find_backbone("minilm")).save_pretrained(folder)
    torch.manual_seed(0)
    ids = {"pad_token_id": 0, "bos_token_id": 101, "eos_token_id": 102, "type_vocab_size": 2}
    model = RobertaModel(roberta_config(width, layers, **ids), add_pooling_layer=False)
    model.to(torch.bfloat16).save_pretrained(folder)
    return str(folder)


def training_rows(args: argparse.Namespace, backbone: str, examples: int) -> Rows:
    """Examples per second of each way, with and without checkpointing."""
    found: dict[str, Rows] = {}
    dtype = "float32" if args.quick else "bfloat16"
    for seed in range(args.repeats):
        for checkpoint in (False, True):
            for arm in training.ARMS if not (args.quick and checkpoint) else ("ours",):
                options = {
                    "backbone": backbone,
                    "data_dir": "mini-glue",
                    "gradient_checkpoint": checkpoint,
                }
                with measured(args.device) as cost:
                    numbers = training.measure(arm, "mrpc", dtype, seed, examples, **options)
                name = f"training: {arm}{', --gradient-checkpoint' * checkpoint}"
                found.setdefault(name, []).append({**numbers, "peak": cost.peak})
    rows = medians(found, "examples_per_second", "peak")
    ours = {row["what"].endswith("checkpoint"): row["examples_per_second"] for row in rows[::3]}
    for row in rows:
        best = ours[row["what"].endswith("checkpoint")]
        row["ratio"] = best / row["examples_per_second"]
    return rows


# -- Llama-3-8B --------------------------------------------------------------------------------


def llama(args: argparse.Namespace) -> Rows:
    """A step, the statistics of a hundred full examples, and the subspaces."""
    config, batch, layers, width = memory.MODELS["llama3-8b"], (64, 128), starts.LLAMA_LAYERS, 4096
    if args.quick:
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 1000}
        config = LlamaConfig(**{**config.to_dict(), **sizes, **heads, "head_dim": None})
        batch, layers, width = (2, 16), 2, 64
    found: dict[str, Rows] = {}

    def take(what: str, run: Callable[[], None]) -> None:
        for _ in range(args.repeats):
            with measured(args.device) as cost:
                run()
            found.setdefault(what, []).append(vars(cost))

    model = memory.random_model(config, "bfloat16", args.device)
    run = memory.step(model, batch, True)
    run()  # warm up
    take("a training step, --gradient-checkpoint", run)
    del model, run
    model = memory.random_model(config, "bfloat16", args.device)
    take("token statistics of one task, 100 examples", lambda: memory.statistics(model, batch))
    del model
    rows = medians(found, "seconds", "peak")
    for init, cost in starts.subspaces(layers, width, args.device).items():
        what = f"subspaces of {layers} layers, 8 tasks: {init}"
        rows.append({"what": what, "seconds": cost.seconds * layers * 8, "peak": cost.peak})
    return rows


# -- merging -----------------------------------------------------------------------------------

METHODS = {"ties": {"density": 0.2}, "emr": {}, "tsv": {}, "knots_ties": {}}


def merge_all(args: argparse.Namespace) -> Rows:
    """Each method computes what it stores, without writing it; the CPU has some of the layers."""
    from osrm.checkpoints import load_adapters
    from osrm.merging import merge

    layers, few = (1, 1) if args.quick else (32, 8)
    found: dict[str, Rows] = {}
    cases = [("cpu", few), (args.device, few)]
    if args.device != "cpu":
        cases += [(args.device, layers)] * args.repeats
    with tempfile.TemporaryDirectory() as directory:
        folders = {}
        for count in {layers, few}:
            folders[count] = Path(directory) / str(count)
            shapes = merging.shapes("llama", count)
            if args.quick:
                shapes = {name: (out // 64, width // 64) for name, (out, width) in shapes.items()}
            merging.write_adapters(shapes, 16, folders[count])
        for method, knobs in METHODS.items():
            for device, count in cases:
                vectors = load_adapters({task: folders[count] / task for task in TASKS})
                with measured(device) as cost:
                    merged = merge(method, vectors, device=device, **knobs)
                    for _ in merged.parts.values():
                        pass
                what = f"{method}, {count} layers, {device}"
                found.setdefault(what, []).append(vars(cost))
    return medians(found, "seconds", "peak")


# -- all parts ---------------------------------------------------------------------------------

PARTS: dict[str, Callable[[argparse.Namespace], Rows]] = {
    "study": study,
    "roberta": roberta,
    "llama": llama,
    "merging": merge_all,
}
COLUMNS = {
    "what": "{what}",
    "seconds": "{seconds}",
    "examples/s": "{examples_per_second}",
    "ratio": "{ratio}",
    "peak memory, GiB": "{peak}",
}


def medians(found: dict[str, Rows], *names: str) -> Rows:
    """A row for each thing that was measured: the medians of its numbers."""
    return [
        {"what": what, **{name: median(run[name] for run in runs) for name in names}}
        for what, runs in found.items()
    ]


def shown(rows: Rows) -> str:
    """The rows as a table; an empty cell was not measured."""
    names = ("seconds", "examples_per_second", "ratio", "peak")
    cells = (
        {"what": row["what"], **{n: f"{row[n]:.3g}" if n in row else "" for n in names}}
        for row in rows
    )
    return table(COLUMNS, [*cells])


def pack(folder: Path) -> Iterator[tuple[Path, int]]:
    """Write what a machine without a network lacks: a cache of ours, and pyarrow as a wheel.

    `folder`/cache is for $OSRM_CACHE: the embedded data, and the model in bfloat16, as the study
    trains it. `folder`/wheels is for Python 3.12 on Linux. Yields both with their bytes.
    """
    import shutil

    from safetensors.torch import load_file, save_file

    from osrm.embedded import mini_glue, minilm
    from osrm.embedded.archives import seal

    cache = folder / "cache"
    for built in (minilm(), mini_glue()):
        shutil.copytree(built, cache / built.name, dirs_exist_ok=True)
    weights = cache / minilm().name / "model.safetensors"
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, {"format": "pt"})
    (weights.parent / "checksums.json").unlink()
    seal(weights.parent)
    wheels = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "pyarrow"]
    wheels += ["--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp"]
    wheels += ["--platform", "manylinux_2_28_x86_64", "--dest", str(folder / "wheels")]
    subprocess.run(wheels, check=True)
    for part in (cache, folder / "wheels"):
        yield part, sum(path.stat().st_size for path in part.rglob("*") if path.is_file())


def main(argv: Sequence[str] | None = None) -> None:
    """Pack, or run the parts that are not finished, and print the tables of all."""
    parser = flags(__doc__)
    parser.add_argument("--pack", type=Path, metavar="DIR", help="write what travels, and stop")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="toy sizes")
    parser.add_argument("--repeats", type=int, default=3, help="runs of everything but the study")
    parser.add_argument("--jobs", type=int, default=8, help="runs of the study at a time")
    args = common.parse(parser, argv)
    if args.pack:
        for part, size in pack(args.pack):
            print(f"{part}: {size / 2**20:.1f} MiB")
        return
    if not args.output:
        parser.error("--output DIR: say where the results go")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU; add --quick --device cpu for a dry run")
    folder = args.output
    folder.mkdir(parents=True, exist_ok=True)
    for part in args.parts:
        args.output = folder
        path = folder / f"{part}.json"
        if path.exists():
            print(f"\n{part}: {path} is there\n\n{shown(json.loads(path.read_text())['rows'])}")
            continue
        begin = time.perf_counter()
        rows = PARTS[part](args)
        args.output, args.part = path, part
        report(args, shown(rows), {"rows": rows, "seconds": time.perf_counter() - begin})


if __name__ == "__main__":
    main()
