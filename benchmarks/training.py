"""How fast train_glue.py trains: beside the published release's way and run_glue's with PEFT.

    python benchmarks/training.py --output benchmarks/results/training.json

The embedded model and tasks, the same examples, adapters, steps and rates for all:

    ours       train_glue.py: examples of like length together, tokenised once
    run_glue   transformers' run_glue.py with PEFT: random order, each batch padded to its longest
    release    the published code: every example padded to --max-seq-len

Each run is a process of its own, and the arms take turns. Examples per second are those of the
Trainer: training and, after each epoch, the same held-out examples, whose score is in the table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
ARMS = ("ours", "run_glue", "release")
RATE, EPOCHS, RANK, ALPHA, BATCH, LENGTH = 2e-3, 2, 8, 16, 32, 128
HELD_OUT = 200


def measure(arm: str, task: str, dtype: str, seed: int, examples: int) -> dict[str, float]:
    """{"examples_per_second", "score"} of one run; the score is the held-out one that selects."""
    from osrm.commands.setting import load_setting, make_plan
    from osrm.config import TrainConfig

    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            backbone="minilm",
            tasks=[task],
            init="gaussian",
            rank=RANK,
            alpha=ALPHA,
            epochs=EPOCHS,
            lr=RATE,
            per_device_train_bsz=BATCH,
            max_seq_len=LENGTH,
            max_train_samples=examples,
            max_eval_samples=HELD_OUT,
            max_test_samples=1,
            dtype=dtype,
            seed=seed,
            output_dir=folder,
        )
        if arm != "ours":
            return peer(arm, load_setting(make_plan(config)), folder)
        from osrm.commands.train import train

        train(config)
        (path,) = Path(folder).glob("*/*/metrics.json")
        metrics = json.loads(path.read_text())
    (score,) = (value for name, value in metrics.items() if name.startswith("selection_"))
    rate = EPOCHS * metrics["train_samples"] / metrics["train_runtime"]
    return {"examples_per_second": rate, "score": score}


def peer(arm: str, setting: Any, folder: str) -> dict[str, float]:
    """The same of the Trainer as run_glue.py or the release sets it up."""
    import torch
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

    from osrm.commands.setting import with_lora
    from osrm.config import derive_seed
    from osrm.glue import task_metrics

    plan = setting.plan
    (task,) = plan.tasks
    low = setting.dtype == torch.bfloat16
    model = with_lora(setting, task, setting.new_model(task), RANK, ALPHA)
    data = setting.tokenized(task)
    padding = {"padding": "max_length", "max_length": LENGTH} if arm == "release" else {}
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=folder,
            num_train_epochs=EPOCHS,
            learning_rate=RATE,
            warmup_steps=plan.config.warmup_ratio,
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=plan.config.per_device_eval_bsz,
            label_names=["labels"],
            eval_strategy="epoch",
            save_strategy="epoch",
            load_best_model_at_end=True,
            metric_for_best_model=f"eval_{task.select}",
            greater_is_better=True,
            save_total_limit=1,
            bf16=low,
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
            seed=derive_seed(plan.config.seed, task.name, "training"),
        ),
        train_dataset=data.train,
        eval_dataset=data.selection,
        data_collator=DataCollatorWithPadding(setting.tokenizer, **padding),
        processing_class=setting.tokenizer,
        compute_metrics=lambda found: task_metrics(task, found.predictions, found.label_ids),
    )
    trainer.train()
    seconds = trainer.state.log_history[-1]["train_runtime"]
    return {
        "examples_per_second": EPOCHS * len(data.train) / seconds,
        "score": trainer.state.best_metric,
    }


def compare(tasks: list[str], dtype: str, repeats: int, examples: int) -> dict[str, Any]:
    """{task: {arm: {"examples_per_second": [], "score": []}}} of interleaved runs."""
    found: dict[str, Any] = {task: {arm: {} for arm in ARMS} for task in tasks}
    for seed in range(repeats):
        for task in tasks:
            for arm in ARMS:
                flags = ["--one", arm, "--tasks", task, "--dtype", dtype, "--seed", str(seed)]
                command = [sys.executable, __file__, *flags, "--examples", str(examples)]
                result = subprocess.run(command, stdout=subprocess.PIPE, check=True, cwd=ROOT)
                for name, value in json.loads(result.stdout.splitlines()[-1]).items():
                    found[task][arm].setdefault(name, []).append(value)
                print(task, arm, seed, found[task][arm], file=sys.stderr, flush=True)
    return found


def table(found: dict[str, Any]) -> str:
    """Medians, ratios of medians, and scores with their spread over seeds."""
    lines = [
        "| task | " + " | ".join(f"{arm}, examples/s" for arm in ARMS) + " | ours / run_glue"
        " | ours / release | " + " | ".join(f"{arm}, held-out score" for arm in ARMS) + " |",
        "| --- |" + " ---: |" * (2 * len(ARMS) + 2),
    ]
    for task, arms in found.items():
        speed = {arm: statistics.median(arms[arm]["examples_per_second"]) for arm in ARMS}
        cells = [f"{speed[arm]:.1f}" for arm in ARMS]
        cells += [f"{speed['ours'] / speed[arm]:.2f}" for arm in ARMS[1:]]
        for arm in ARMS:
            scores = [100 * each for each in arms[arm]["score"]]
            spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
            cells.append(f"{statistics.mean(scores):.1f} ± {spread:.1f}")
        lines.append(f"| {task} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Run what the flags say, print the table, write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", default=["mrpc", "sst2", "mnli", "cola"])
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--repeats", type=int, default=3, help="runs of each arm, a seed each")
    parser.add_argument("--examples", type=int, default=1000, help="training examples a task")
    parser.add_argument("--one", choices=ARMS, help="run this arm once, and print its numbers")
    parser.add_argument("--seed", type=int, default=0, help="of --one")
    parser.add_argument("--output", type=Path, help="a JSON file for all numbers")
    args = parser.parse_args(argv)
    if args.one:
        print(json.dumps(measure(args.one, args.tasks[0], args.dtype, args.seed, args.examples)))
        return
    found = compare(args.tasks, args.dtype, args.repeats, args.examples)
    print(table(found))
    if args.output:
        from osrm.runs import environment, write_json

        record = {"flags": vars(args) | {"output": None}, "tasks": found}
        write_json(args.output, {**record, "environment": environment()})


if __name__ == "__main__":
    main()
