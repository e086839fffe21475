"""Fine-tuning of one task with the Hugging Face Trainer."""

from __future__ import annotations

import logging
import math
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import get_length_grouped_indices
from transformers.trainer_utils import get_last_checkpoint

from osrm import processes
from osrm.config import TrainConfig
from osrm.data import TaskData, collator
from osrm.errors import Diverged, Interrupted
from osrm.files import write_text
from osrm.glue import GlueTask, task_metrics
from osrm.runs import CHECKPOINTS, run_dir
from osrm.seeds import derive_seed

logger = logging.getLogger(__name__)

UNFINISHED = "unfinished"  # the file that names the checkpoint that is being written
LOOK = 8  # steps from one look at what only the device knows to the next; each look waits for it


def enable_checkpointing(model: PeftModel) -> None:
    """Recompute activations in the backward pass; the adapters keep their gradients.

    The re-entrant form, which the release used, trains the head alone: it gives no gradient to a
    block whose input needs none, and the embeddings are frozen.
    """
    # The newest transformers that we allow deprecate this name; the oldest know no other.
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})


class EpochOrder(Sampler[int]):
    """Examples of similar lengths together, in an order that depends on seed and epoch alone.

    The Trainer's own sampler draws from the global generator. Its state at the beginning of an
    epoch is unknown to a run that continues in the middle of that epoch.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.lengths = trainer, trainer.train_dataset.lengths

    def __iter__(self) -> Iterator[int]:
        args, epoch = self.trainer.args, int(self.trainer.state.epoch or 0)
        generator = torch.Generator().manual_seed(derive_seed(args.seed, f"epoch {epoch}"))
        step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return iter(get_length_grouped_indices(self.lengths, step, generator=generator))

    def __len__(self) -> int:
        return len(self.lengths)


class TaskTrainer(Trainer, TrainerCallback):
    """The Trainer with `EpochOrder`; it recognises an interrupted checkpoint, and may stop early.

    All processes stop at one step, after a loss that is not finite or after a signal, within `LOOK`
    steps. After a signal there is a checkpoint, from which --resume continues to the same result.
    """

    def __init__(
        self, signals: list[int], penalty: Callable[[], Tensor] | None, **options: Any
    ) -> None:
        """`signals` holds the numbers of those that arrived, and grows during the training.

        `penalty()` is added to the loss of every training batch.
        """
        super().__init__(**options)
        # Every loss is a mean over its batch. The Trainer does not believe it of some models, and
        # would add up accumulated batches and multiply by the number of processes.
        self.model_accepts_loss_kwargs = False
        self.signals, self.penalty = signals, penalty
        self.broken = torch.tensor(math.inf)  # the first step whose loss is not finite
        self.first_step = 0.0  # when it began, in seconds since 1970
        self.add_callback(self)

    def _get_train_sampler(self, _: Any = None) -> Sampler[int]:
        return EpochOrder(self)

    def compute_loss(self, model: Any, *args: Any, **options: Any) -> Any:
        """The Trainer's, in training with the penalty."""
        loss = super().compute_loss(model, *args, **options)
        return loss + self.penalty() if self.penalty and model.training else loss

    def training_step(self, *args: Any, **options: Any) -> Tensor:
        """The Trainer's; also notes a loss that is not finite, without waiting for the device."""
        loss = super().training_step(*args, **options)
        broken, step = self.broken.to(loss.device), self.state.global_step + 1
        self.broken = torch.where(loss.isfinite(), broken, broken.clamp(max=step))
        return loss

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        unfinished = Path(self.args.output_dir) / UNFINISHED
        if processes.is_first():
            write_text(unfinished, f"checkpoint-{self.state.global_step}")
        try:
            super()._save_checkpoint(model, trial)
        except RuntimeError:
            # torch.save does not say why it failed; writing a file here raises the OSError.
            with tempfile.TemporaryFile(dir=self.args.output_dir) as probe:
                probe.write(bytes(2**20))
            raise
        processes.barrier()
        if processes.is_first():
            unfinished.unlink()

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Everything is ready for the first step."""
        self.first_step = time.time()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Raises Diverged or Interrupted."""
        alone, ends = processes.count() == 1, state.epoch == int(state.epoch or 0)
        if not (ends or state.global_step % LOOK == 0 or (alone and self.signals)):
            return
        number = self.broken.new_tensor(max(self.signals, default=0))
        seen = torch.stack([-self.broken, number])
        if not alone:
            dist.all_reduce(seen, dist.ReduceOp.MAX)
        step, number = seen.tolist()
        if math.isfinite(step):
            raise Diverged(
                f"the loss of step {-step:.0f} is not finite, at a peak learning rate of"
                f" {args.learning_rate:g}; choose a smaller --lr and another --output-dir"
            )
        # At the end of an epoch wait for the evaluation: the checkpoint must have its score.
        if number and not ends:
            self._save_checkpoint(self.model, None)
            raise Interrupted(int(number), f"--resume goes on from step {state.global_step}")


@contextmanager
def recorded_signals() -> Iterator[list[int]]:
    """Yields a list to which SIGINT and SIGTERM append their numbers, without any other effect."""
    received: list[int] = []
    numbers = signal.SIGINT, signal.SIGTERM
    before = [signal.signal(n, lambda number, _: received.append(number)) for n in numbers]
    try:
        yield received
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)


def last_checkpoint(directory: Path) -> str | None:
    """The newest complete checkpoint; an incomplete one, from a killed run, is deleted."""
    unfinished = directory / UNFINISHED
    if processes.is_first() and unfinished.exists():
        shutil.rmtree(directory / unfinished.read_text(), ignore_errors=True)
        unfinished.unlink()
    processes.barrier()
    return get_last_checkpoint(str(directory)) if directory.is_dir() else None


def full_state(trainer: Trainer) -> dict[str, Tensor] | None:
    """All tensors of a model that FSDP sharded, None without sharding; every process calls this.

    The first process gets the tensors, the others {}.
    """
    sharded = trainer.is_fsdp_enabled
    return trainer.accelerator.get_state_dict(trainer.model_wrapped) if sharded else None


def fit(
    model: PeftModel,
    task: GlueTask,
    data: TaskData,
    tokenizer: Any,
    *,
    config: TrainConfig,
    penalty: Callable[[], Tensor] | None = None,
) -> Trainer:
    """Train `model` in place; it ends with the weights of its best epoch on `data.selection`.

    `config` has the `epochs` and `lr` of this task. Training continues from the newest checkpoint
    in the run directory, if there is one. `penalty()` is added to the loss of every batch. Raises
    Diverged, or Interrupted. The Trainer's `state.best_metric` is the score on `data.selection`.
    """
    checkpoints = run_dir(config, task.name) / CHECKPOINTS
    if config.gradient_checkpoint:
        enable_checkpointing(model)
    best = None if config.not_load_best_model_at_end else f"eval_{task.select}"
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=config.epochs,
        learning_rate=config.lr,
        lr_scheduler_type=config.lr_scheduler,
        warmup_steps=config.warmup_ratio,  # below 1: a share of the steps
        weight_decay=config.weight_decay,
        per_device_train_batch_size=config.per_device_train_bsz,
        per_device_eval_batch_size=config.per_device_eval_bsz,
        gradient_accumulation_steps=config.grad_accumlate_steps,
        train_sampling_strategy="group_by_length",  # of the selection too
        remove_unused_columns=False,  # there are none
        label_names=["labels"],
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_strategy="epoch",
        logging_nan_inf_filter=False,  # `TaskTrainer` looks at every loss
        save_total_limit=1,
        load_best_model_at_end=best is not None,
        metric_for_best_model=best,
        bf16=model.dtype == torch.bfloat16,
        dataloader_pin_memory=torch.cuda.is_available(),
        accelerator_config={"non_blocking": torch.cuda.is_available()},
        optim="adamw_torch_fused",
        report_to=config.report_to,
        disable_tqdm=False,
        ddp_find_unused_parameters=False,
        use_cpu=not torch.cuda.is_available(),  # else bf16 is refused there
        seed=derive_seed(config.seed, task.name, "training"),
    )
    # One process may see several GPUs; the Trainer would copy the model to each in every step
    # (DataParallel). accelerate and torchrun start a process for each GPU instead.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    with recorded_signals() as signals:
        trainer = TaskTrainer(
            signals,
            penalty,
            model=model,
            args=arguments,
            train_dataset=data.train,
            eval_dataset=data.selection,
            data_collator=collator(tokenizer),
            processing_class=tokenizer,
            compute_metrics=lambda output: task_metrics(task, output.predictions, output.label_ids),
            # T5 returns its hidden states too; keep the logits alone.
            preprocess_logits_for_metrics=lambda out, _: out[0] if isinstance(out, tuple) else out,
        )
        if last := last_checkpoint(checkpoints):
            logger.info("%s goes on from %s", task.name, last)
        trainer.train(resume_from_checkpoint=last)
    if signals:
        raise Interrupted(signals[0], "--resume goes on after the last step")
    return trainer
