"""How fast train_glue.py trains: beside the published release's way and run_glue's with PEFT.

    python benchmarks/training.py --examples 480 --output benchmarks/results/training.json

The embedded model and tasks, the same examples, adapters, steps and rates for all:

    ours       train_glue.py: batches of like length, tokenised once
    run_glue   transformers' run_glue.py with PEFT: random order, each batch padded to its longest
    release    the published code: every example padded to --max-seq-len

Each run is a process of its own, and the arms take turns. Examples per second are those of the
Trainer. They count the training and, after each epoch, the evaluation on the same held-out
examples, whose score is in the table.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from common import flags, in_new_process, parse, report, table

ARMS = ("ours", "run_glue", "release")
RATE, EPOCHS, RANK, ALPHA, BATCH, LENGTH = 2e-3, 2, 8, 16, 32, 128
HELD_OUT = 200


def measure(
    arm: str, task: str, dtype: str, seed: int, examples: int, **options: Any
) -> dict[str, float]:
    """{"examples_per_second", "score"} of one run; the score is the held-out one that selects.

    `options` are other flags of train_glue.py.
    """
    from osrm.commands.plan import make_plan
    from osrm.config import TrainConfig

    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            **{"backbone": "minilm", **options},
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
            return peer(arm, make_plan(config), folder)
        from osrm.commands.train import train

        train(config)
        (path,) = Path(folder).glob("*/*/metrics.json")
        metrics = json.loads(path.read_text())
    (score,) = (value for name, value in metrics.items() if name.startswith("selection_"))
    rate = EPOCHS * metrics["train_samples"] / metrics["train_runtime"]
    return {"examples_per_second": rate, "score": score}


def peer(arm: str, plan: Any, folder: str) -> dict[str, float]:
    """The same of the Trainer as run_glue.py or the release sets it up."""
    import torch
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

    from osrm.commands.finish import with_lora
    from osrm.commands.plan import open_session
    from osrm.glue import task_metrics
    from osrm.seeds import derive_seed
    from osrm.training import enable_checkpointing

    session, (task,) = open_session(plan), plan.tasks
    low = session.dtype == torch.bfloat16
    model = with_lora(plan.config, task, session.model(task), rank=RANK, alpha=ALPHA)
    if plan.config.gradient_checkpoint:
        enable_checkpointing(model)
    data = session.tokenized(task)
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
        data_collator=DataCollatorWithPadding(session.tokenizer, **padding),
        processing_class=session.tokenizer,
        compute_metrics=lambda output: task_metrics(task, output.predictions, output.label_ids),
    )
    trainer.train()
    seconds = trainer.state.log_history[-1]["train_runtime"]
    return {
        "examples_per_second": EPOCHS * len(data.train) / seconds,
        "score": trainer.state.best_metric,
    }


def compare(
    tasks: Sequence[str], dtype: str, repeats: int, examples: int, *, threads: int
) -> dict[str, Any]:
    """{task: {arm: {"examples_per_second": [], "score": []}}} of interleaved runs."""
    runs: dict[str, Any] = {task: {arm: {} for arm in ARMS} for task in tasks}
    for seed in range(repeats):
        for task in tasks:
            for arm in ARMS:
                numbers, _ = in_new_process(threads, measure, arm, task, dtype, seed, examples)
                for name, value in numbers.items():
                    runs[task][arm].setdefault(name, []).append(value)
                print(task, arm, seed, numbers, flush=True)
    return runs


def rows(tasks: dict[str, Any]) -> str:
    """Medians, ratios of medians, and scores with their spread over seeds."""
    records = []
    for task, arms in tasks.items():
        speeds, scores = (
            pd.DataFrame({arm: numbers[name] for arm, numbers in arms.items()})
            for name in ("examples_per_second", "score")
        )
        speed, mean, spread = speeds.median(), 100 * scores.mean(), 100 * scores.std()
        gain = speed["ours"] / speed
        records.append({"task": task, "speed": speed, "gain": gain, "mean": mean, "std": spread})
    columns = {
        "task": "{task}",
        **{f"{arm}, examples/s": f"{{speed[{arm}]:.1f}}" for arm in ARMS},
        **{f"ours / {arm}": f"{{gain[{arm}]:.2f}}" for arm in ARMS[1:]},
        **{f"{arm}, held-out score": f"{{mean[{arm}]:.1f}} ± {{std[{arm}]:.1f}}" for arm in ARMS},
    }
    return table(columns, records)


def main(argv: Sequence[str] | None = None) -> None:
    """Run what the flags say, print the table, write the JSON."""
    parser = flags(__doc__)
    parser.add_argument("--tasks", nargs="+", default=["mrpc", "sst2", "mnli", "cola"])
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--repeats", type=int, default=3, help="runs of each arm, a seed each")
    parser.add_argument("--examples", type=int, default=1000, help="training examples a task")
    args = parse(parser, argv)
    tasks = compare(args.tasks, args.dtype, args.repeats, args.examples, threads=args.threads)
    report(args, rows(tasks), {"tasks": tasks})


if __name__ == "__main__":
    main()
