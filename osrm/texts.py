"""Scores of language models: the loss per token of each task's texts, which --eval-text names."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import takewhile
from operator import eq
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from osrm.backbones import LANGUAGE, Backbone, load_tokenizer
from osrm.checks import nonempty, problems, text
from osrm.config import MergeConfig, TrainConfig
from osrm.data import Encoded, TaskData, validation_splits
from osrm.devices import find_device
from osrm.errors import UserError
from osrm.evaluation import Predictions, predict
from osrm.glue import GlueTask
from osrm.lending import load_head
from osrm.session import Session

LOGITS = 2**28
"""A batch has at most so many logits, or one example: 1 GiB in float32."""

FIELDS = {"text": nonempty, "prompt": text, "completion": nonempty}
FORMS = {"text"}, {"prompt", "completion"}


@dataclass(frozen=True)
class TextSession(Session):
    """A language model and texts of its tasks, with columns `prompt` and `completion`.

    A prediction is the sum of a text's token losses, its truth the number of these tokens.
    """

    def model(self, task: GlueTask, head: Mapping[str, Tensor] | None = None) -> Any:
        """The base model, with the modules that the task's adapter saved whole."""
        model, new = LANGUAGE.load(self.backbone, (), self.dtype)
        if head is not None:
            load_head(model, head, new)
        model.config.use_cache = False  # keys and values would stay in memory
        return model.to(self.device)

    def encoded(self, task: GlueTask, examples: pd.DataFrame) -> Encoded:
        """The texts as token ids, with `labels`: how many tokens at their end count."""
        return encode(examples, self.tokenizer, self.max_seq_len[task.name])

    def rows(self, encoded: Encoded) -> int:
        """As many as the batch size, and fewer if the texts are long."""
        return max(1, min(self.batch_size, LOGITS // (max(encoded.lengths) * len(self.tokenizer))))

    def predict(
        self, model: Any, task: GlueTask, splits: Mapping[str, Encoded], title: str | None = None
    ) -> Predictions:
        """Of each text the sum of its losses, and the number of tokens that count."""
        (encoded,) = splits.values()
        losses, counts = predict(
            model,
            encoded,
            self.tokenizer,
            self.rows(encoded),
            title=title or task.name,
            outputs=summed_losses,
        )
        return {"": (losses[:, 0], counts)}

    def scores(self, task: GlueTask, predictions: Predictions) -> dict[str, float]:
        """Loss per token (nats), perplexity, and number of tokens, over all texts."""
        losses, counts = predictions[""]
        tokens, loss = int(counts.sum()), float(losses.sum() / counts.sum())
        return {
            "eval_loss": loss,
            "eval_perplexity": float(np.exp(loss)),
            "eval_tokens": tokens,
            "eval_samples": len(counts),
        }


def open_texts(
    config: MergeConfig, backbone: Backbone, tasks: Iterable[str]
) -> tuple[TextSession, dict[str, dict[str, Any]]]:
    """The session of --eval-text, and {task: data and settings of its scores}.

    With --search every second text is held out. Raises UserError for bad files.
    """
    tokenizer = load_tokenizer(backbone)
    base, _ = LANGUAGE.load(backbone, (), "auto", "meta")
    positions = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    longest = min(tokenizer.model_max_length, positions or tokenizer.model_max_length)
    most = -1 if config.max_test_samples is None else config.max_test_samples
    data: dict[str, TaskData] = {}
    settings: dict[str, dict[str, Any]] = {}
    for name in tasks:
        path = Path(str(config.eval_text)) / f"{name}.jsonl"
        texts = read_texts(path)
        counts = encode(texts, tokenizer, longest).datasets["labels"]
        texts = texts[np.array(counts) > 0]  # the others have no loss
        held_out, reported = texts.head(0), texts
        if config.search:
            held_out, reported = texts.iloc[1::2], texts.iloc[::2]
        if reported.empty or (config.search and held_out.empty):
            raise UserError(
                f"--eval-text {path}: too few texts with a token to predict; add some (--search"
                " holds out every second one)"
            )
        splits = validation_splits({"validation": reported}, most, TrainConfig().seed)
        data[name] = TaskData(texts.head(0), held_out, splits)
        settings[name] = {
            "eval_text": str(path),
            "max_seq_len": longest,
            "max_test_samples": most,
            "held_out_examples": len(held_out),
            "batch_size": config.per_device_eval_bsz,
            "dtype": config.eval_dtype,
        }
    session = TextSession(
        backbone,
        tokenizer,
        find_device(config.device),
        getattr(torch, config.eval_dtype),
        seed=0,
        batch_size=config.per_device_eval_bsz,
        tasks={name: GlueTask(name, ("prompt", "completion"), (), ("loss",)) for name in data},
        max_seq_len=dict.fromkeys(data, longest),
        data=data,
    )
    return session, settings


def read_texts(path: Path) -> pd.DataFrame:
    """The columns `prompt`, "" for a plain text, and `completion` of a file, a row a line.

    Raises UserError that names the line, the field and the fix.
    """
    rows = []
    fix = 'write {"text": ...} or {"prompt": ..., "completion": ...}, an object a line'
    try:
        lines = path.read_text("utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"--eval-text {path}: cannot be read ({error}); {fix}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"--eval-text {path}, line {number}"
        try:
            example = json.loads(line)
            json.dumps(example, ensure_ascii=False).encode()  # "\\ud800" is half a character
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: broken JSON ({error}); {fix}") from None
        if not isinstance(example, dict) or example.keys() & FIELDS.keys() not in FORMS:
            raise UserError(f"{where}: expected the field text, or prompt and completion; {fix}")
        if wrong := problems(example, FIELDS):
            raise UserError(f"{where}, {'; '.join(wrong)}; {fix}")
        rows.append((example.get("prompt", ""), example.get("completion", example.get("text"))))
    if not rows:
        raise UserError(f"--eval-text {path}: holds no text; {fix}")
    return pd.DataFrame(rows, columns=["prompt", "completion"])


def encode(examples: pd.DataFrame, tokenizer: Any, longest: int) -> Encoded:
    """Prompt and completion as one text of `longest` tokens; a longer one loses its start.

    `labels` are how many tokens at the end count: those of the completion, also one that has the
    end of the prompt in it, but for the first of a text, which nothing predicts.
    """
    prompts, texts = (
        tokenizer(column.tolist(), verbose=False)["input_ids"]
        for column in (examples["prompt"], examples["prompt"] + examples["completion"])
    )
    counts: list[int] = []
    ids: list[np.ndarray] = []
    for prompt, whole in zip(prompts, texts):
        kept = whole[-longest:]
        start = sum(takewhile(bool, map(eq, prompt, whole)))
        counts.append(max(0, min(len(whole) - start, len(kept) - 1)))
        ids.append(np.array(kept, np.int32))
    columns: dict[str, Any] = {"labels": counts, "input_ids": ids}
    return Encoded(**columns)


def summed_losses(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The summed loss (n, 1) of the last `labels` tokens of each text, padded on the right."""
    counts, mask = batch.pop("labels")[:, None], batch["attention_mask"]
    logits = model(**batch).logits[:, :-1]
    places, lengths = torch.arange(mask.shape[1], device=mask.device), mask.sum(1, keepdim=True)
    counted = ((places >= lengths - counts) & (places < lengths))[:, 1:]
    losses = torch.zeros(counted.shape, dtype=torch.float64, device=mask.device)
    wanted = batch["input_ids"][:, 1:][counted].long()
    losses[counted] = cross_entropy(logits[counted].float(), wanted, reduction="none").double()
    return losses.sum(1, keepdim=True)
