"""Fine-tuning of one task with the Hugging Face Trainer."""

from __future__ import annotations

import logging
import shutil
import signal
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor
from torch.utils.data import Sampler
from transformers import (
    EvalPrediction,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_pt_utils import get_length_grouped_indices
from transformers.trainer_utils import get_last_checkpoint

from osrm import processes
from osrm.config import TrainConfig, derive_seed
from osrm.errors import Diverged, Interrupted
from osrm.glue import GlueTask, TaskData, collator, task_metrics
from osrm.runs import write_text

logger = logging.getLogger(__name__)

UNFINISHED = "unfinished"
"""The file that names the checkpoint that is being written."""


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
        step = (
            arguments.train_batch_size
            * arguments.gradient_accumulation_steps
            * arguments.world_size
        )
        return iter(get_length_grouped_indices(self.lengths, step, generator=generator))

    def __len__(self) -> int:
        return len(self.lengths)


class TaskTrainer(Trainer):
    """The Trainer with the order of `OrderOfEpoch`, `EndOfStep`, and checkpoints that are whole.

    Args:
        signals: those that came, and will come.
    """

    def __init__(self, signals: list[int], **options: Any) -> None:
        super().__init__(**options)
        # The losses are means over a batch, also of models that accept what they do not heed: the
        # Trainer would add up accumulated batches, and multiply by the number of processes.
        self.model_accepts_loss_kwargs = False
        self.finite = torch.tensor(True)
        self.first_step = time.time()
        self.add_callback(EndOfStep(self, signals))

    def _get_train_sampler(self, _: Any = None) -> Sampler[int]:
        return OrderOfEpoch(self)

    def training_step(self, *args: Any, **options: Any) -> Tensor:
        """The Trainer's; notes a loss that is not finite, without waiting for the device."""
        loss = super().training_step(*args, **options)
        self.finite = self.finite.to(loss.device) & loss.isfinite()
        return loss

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        unfinished = Path(self.args.output_dir) / UNFINISHED
        if processes.is_first():
            write_text(unfinished, f"checkpoint-{self.state.global_step}")
        try:
            super()._save_checkpoint(model, trial)
        except RuntimeError:
            # torch.save does not say why it could not write; a file that is written here does.
            with tempfile.TemporaryFile(dir=self.args.output_dir) as probe:
                probe.write(bytes(2**20))
            raise
        processes.barrier()
        if processes.is_first():
            unfinished.unlink()


class EndOfStep(TrainerCallback):
    """Ends a training between two steps, in all processes at the same one.

    A signal ends it with a checkpoint, from which --resume goes on as if undisturbed; a loss that
    is not finite ends it for good.
    """

    def __init__(self, trainer: TaskTrainer, signals: list[int]) -> None:
        self.trainer, self.signals = trainer, signals

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """All is ready for the first step."""
        self.trainer.first_step = time.time()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Raises Diverged or Interrupted."""
        finite = self.trainer.finite
        seen = torch.tensor([0.0, max(self.signals, default=0)], device=finite.device)
        seen[0] = ~finite
        if processes.count() > 1:
            dist.all_reduce(seen, dist.ReduceOp.MAX)
        diverged, number = map(int, seen.tolist())
        if diverged:
            raise Diverged(
                f"the loss of step {state.global_step} is not finite, at a peak learning rate of"
                f" {args.learning_rate:g}; choose a smaller --lr and another --output-dir"
            )
        # At the end of an epoch the score of its selection comes first, or it would be lost.
        if number and state.epoch != int(state.epoch or 0):
            self.trainer._save_checkpoint(self.trainer.model, None)
            raise Interrupted(number, f"--resume goes on from step {state.global_step}")


@contextmanager
def signals_noted() -> Iterator[list[int]]:
    """SIGINT and SIGTERM do nothing here but to stand in the list that this yields."""
    received: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def last_checkpoint(directory: Path) -> str | None:
    """The newest whole checkpoint; one that a killed run left in part is deleted."""
    unfinished = directory / UNFINISHED
    if processes.is_first() and unfinished.exists():
        shutil.rmtree(directory / unfinished.read_text(), ignore_errors=True)
        unfinished.unlink()
    processes.barrier()
    return get_last_checkpoint(str(directory)) if directory.is_dir() else None


def full_state(trainer: Trainer) -> dict[str, Tensor] | None:
    """All tensors of a model that is sharded over the processes (FSDP); None of one that is not.

    Every process must call this; the first has the result.
    """
    if not trainer.is_fsdp_enabled:
        return None
    return trainer.accelerator.get_state_dict(trainer.model_wrapped)


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

    Raises:
        Diverged: a loss that is not finite.
        Interrupted: a signal came; there is a checkpoint.
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
        logging_nan_inf_filter=False,  # `EndOfStep` looks at every loss
        save_total_limit=1,
        load_best_model_at_end=select_best,
        metric_for_best_model=f"eval_{task.select}" if select_best else None,
        greater_is_better=True if select_best else None,
        bf16=model.dtype == torch.bfloat16,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to=config.report_to,
        disable_tqdm=False,
        ddp_find_unused_parameters=False,
        use_cpu=not torch.cuda.is_available(),  # or bf16 would be refused there
        seed=seed,
    )

    # Several GPUs that one process sees would each get a copy of the model in every step
    # (DataParallel); accelerate and torchrun give each a process of its own.
    arguments._n_gpu = min(arguments.n_gpu, 1)

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        return task_metrics(task, prediction.predictions, prediction.label_ids)

    with signals_noted() as signals:
        trainer = TaskTrainer(
            signals,
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
        last = last_checkpoint(checkpoints)
        if last:
            logger.info("%s goes on from %s", task.name, last)
        trainer.train(resume_from_checkpoint=last)
    if signals:
        raise Interrupted(signals[0], "--resume goes on after the last step")
    return trainer
