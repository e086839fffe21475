"""Fine-tuning of one task with the Hugging Face Trainer."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.utils.data import Sampler
from transformers import EvalPrediction, Trainer, TrainingArguments
from transformers.trainer_pt_utils import get_length_grouped_indices
from transformers.trainer_utils import get_last_checkpoint

from osrm.config import TrainConfig, derive_seed
from osrm.glue import GlueTask, TaskData, collator, task_metrics

logger = logging.getLogger(__name__)


def enable_checkpointing(model: Any) -> None:
    """Recompute activations in the backward pass, without losing the adapters' gradients.

    The re-entrant form gives no gradient to anything inside a block whose input needs none, and
    the embeddings are frozen: the release trained the head alone that way.
    """
    with warnings.catch_warnings():
        # Its new name exists only in the newest versions of transformers that we allow.
        warnings.simplefilter("ignore", FutureWarning)
        model.get_base_model().gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )


class OrderOfEpoch(Sampler[int]):
    """Examples of like length together, in an order that seed and epoch alone decide.

    The Trainer's own takes the order from the global generator, whose state at the beginning of
    an epoch is not known to a run that goes on from the middle of it.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.lengths = list(trainer.train_dataset["length"])

    def __iter__(self) -> Iterator[int]:
        arguments, epoch = self.trainer.args, int(self.trainer.state.epoch or 0)
        generator = torch.Generator().manual_seed(derive_seed(arguments.seed, f"epoch {epoch}"))
        step = arguments.train_batch_size * arguments.gradient_accumulation_steps
        return iter(get_length_grouped_indices(self.lengths, step, generator=generator))

    def __len__(self) -> int:
        return len(self.lengths)


class TaskTrainer(Trainer):
    """The Trainer, with the order of `OrderOfEpoch`."""

    def _get_train_sampler(self, _: Any = None) -> Sampler[int]:
        return OrderOfEpoch(self)


def fit(
    model: PeftModel,
    task: GlueTask,
    data: TaskData,
    tokenizer: Any,
    config: TrainConfig,
    epochs: int,
    lr: float,
    seed: int,
    checkpoints: Path,
) -> Trainer:
    """Train `model` in place; it ends as its best epoch on `data.selection`.

    Goes on from the newest checkpoint in `checkpoints`, if there is one.

    Returns:
        the Trainer; `state.best_metric` is the selection score.
    """
    if config.gradient_checkpoint:
        enable_checkpointing(model)
    select_best = not config.not_load_best_model_at_end
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=epochs,
        learning_rate=lr,
        lr_scheduler_type=config.lr_scheduler,
        warmup_steps=config.warmup_ratio,  # below 1: a share of the steps
        weight_decay=config.weight_decay,
        per_device_train_batch_size=config.per_device_train_bsz,
        per_device_eval_batch_size=config.per_device_eval_bsz,
        gradient_accumulation_steps=config.grad_accumlate_steps,
        train_sampling_strategy="group_by_length",
        length_column_name="length",
        remove_unused_columns=False,  # would drop `length`
        label_names=["labels"],
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_strategy="epoch",
        save_total_limit=1,
        load_best_model_at_end=select_best,
        metric_for_best_model=f"eval_{task.select}" if select_best else None,
        greater_is_better=True if select_best else None,
        bf16=model.dtype == torch.bfloat16,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to=config.report_to,
        disable_tqdm=False,
        use_cpu=not torch.cuda.is_available(),  # or bf16 would be refused there
        seed=seed,
    )

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        return task_metrics(task, prediction.predictions, prediction.label_ids)

    trainer = TaskTrainer(
        model=model,
        args=arguments,
        train_dataset=data.train,
        eval_dataset=data.selection,
        data_collator=collator(tokenizer),
        processing_class=tokenizer,
        compute_metrics=compute_metrics,
        # T5 returns its hidden states too; keep the logits alone.
        preprocess_logits_for_metrics=lambda out, _: out[0] if isinstance(out, tuple) else out,
    )
    last = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    if last:
        logger.info("%s goes on from %s", task.name, last)
    trainer.train(resume_from_checkpoint=last)
    return trainer
