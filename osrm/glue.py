"""The eight GLUE tasks: their rows, where their data comes from, how they are scored."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import evaluate
import numpy as np
import pandas as pd
from datasets import Dataset, DatasetDict
from pandas.errors import ParserWarning
from scipy.stats import pearsonr, spearmanr
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding

from osrm import embedded, processes
from osrm.config import MINI_GLUE
from osrm.errors import UserError, first_line
from osrm.features import batches_by_length

HUB_DATA = "nyu-mll/glue"
# All is text: "NA" and "7" are sentences too. The first column is never an index.
_AS_TEXT: dict[str, Any] = {"dtype": str, "keep_default_na": False, "index_col": False}
READERS = {
    "parquet": pd.read_parquet,
    "jsonl": lambda path: pd.read_json(path, lines=True, dtype=False),
    "csv": lambda path: pd.read_csv(path, **_AS_TEXT),
    "tsv": lambda path: pd.read_csv(path, sep="\t", **_AS_TEXT),
}


@dataclass(frozen=True)
class GlueTask:
    """One task. `labels` is empty for a regression; `select` is the metric of the best epoch."""

    name: str
    fields: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    select: str = "accuracy"

    @property
    def num_labels(self) -> int:
        """Outputs of the head."""
        return len(self.labels) or 1

    @property
    def score(self) -> str:
        """The metric that stands in the paper's tables."""
        return "combined_score" if len(self.metrics) > 1 else self.metrics[0]

    @property
    def validation_splits(self) -> dict[str, str]:
        """{suffix of the metric names: split}; run_glue.py's `_mm` is MNLI's mismatched one."""
        if self.name == "mnli":
            return {"": "validation_matched", "_mm": "validation_mismatched"}
        return {"": "validation"}


_F1 = ("accuracy", "f1")
_PAIR = ("sentence1", "sentence2")
_NLI = ("entailment", "not_entailment")
TASKS = {
    task.name: task
    for task in (
        GlueTask("mrpc", _PAIR, ("not_equivalent", "equivalent"), _F1),
        GlueTask("qnli", ("question", "sentence"), _NLI, ("accuracy",)),
        GlueTask("qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), _F1),
        GlueTask("rte", _PAIR, _NLI, ("accuracy",)),
        GlueTask("sst2", ("sentence",), ("negative", "positive"), ("accuracy",)),
        GlueTask(
            "mnli",
            ("premise", "hypothesis"),
            ("entailment", "neutral", "contradiction"),
            ("accuracy",),
        ),
        GlueTask(
            "cola",
            ("sentence",),
            ("unacceptable", "acceptable"),
            ("matthews_correlation",),
            select="matthews_correlation",
        ),
        GlueTask("stsb", _PAIR, (), ("pearson", "spearmanr"), select="combined_score"),
    )
}


def find_tasks(names: Iterable[str], field: str) -> list[GlueTask]:
    """The rows of `names`, each once; `field` says where the names come from."""
    names = list(dict.fromkeys(names))
    unknown = [name for name in names if name not in TASKS]
    if unknown:
        raise UserError(f"{field}: unknown task {', '.join(unknown)}; the tasks are {[*TASKS]}")
    return [TASKS[name] for name in names]


# -- scores ------------------------------------------------------------------------------------


def _accuracy(predicted: np.ndarray, true: np.ndarray) -> float:
    return float((predicted == true).mean())


def _f1(predicted: np.ndarray, true: np.ndarray) -> float:
    """F1 of label 1; 0 where neither prediction nor truth has one."""
    positives = (predicted == 1).sum() + (true == 1).sum()
    hits = ((predicted == 1) & (true == 1)).sum()
    return float(2 * hits / positives) if positives else 0.0


def _matthews(predicted: np.ndarray, true: np.ndarray) -> float:
    """The correlation of two binary vectors; 0 where one of them is constant."""
    if predicted.std() == 0 or true.std() == 0:
        return 0.0
    return float(np.corrcoef(predicted, true)[0, 1])


def _correlation(function: Any) -> Any:
    def correlation(predicted: np.ndarray, true: np.ndarray) -> float:
        if np.ptp(predicted) == 0 or np.ptp(true) == 0:
            return 0.0
        return float(function(predicted, true).statistic)

    return correlation


_SCORES = {
    "accuracy": _accuracy,
    "f1": _f1,
    "matthews_correlation": _matthews,
    "pearson": _correlation(pearsonr),
    "spearmanr": _correlation(spearmanr),
}


class GlueMetric(evaluate.Metric):
    """`evaluate`'s GLUE metric without the hub: `GlueMetric("mrpc").compute(...)`.

    A constant prediction has no correlation; it counts as 0, not NaN.
    """

    def __init__(self, task: str) -> None:
        self.task = TASKS[task]
        super().__init__(config_name=task, keep_in_memory=True)

    def _info(self) -> evaluate.MetricInfo:
        value = datasets.Value("int64" if self.task.labels else "float32")
        return evaluate.MetricInfo(
            description="The metrics that GLUE reports for one of its tasks.",
            citation="Wang et al., 2019, GLUE",
            features=datasets.Features({"predictions": value, "references": value}),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        predicted, true = np.asarray(predictions), np.asarray(references)
        scores = {name: _SCORES[name](predicted, true) for name in self.task.metrics}
        if len(scores) > 1:
            scores["combined_score"] = float(np.mean(list(scores.values())))
        return scores


def task_metrics(task: GlueTask, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """GLUE's metrics of a model's outputs, logits (n, labels)."""
    return GlueMetric(task.name).compute(predictions=predicted(task, logits), references=labels)


def predicted(task: GlueTask, logits: np.ndarray) -> np.ndarray:
    """The class of each example, or the value of a regression (n,), of logits (n, labels)."""
    return logits.argmax(-1) if task.labels else logits[:, 0]


# -- data --------------------------------------------------------------------------------------


def available_tasks(data_dir: str | None) -> list[str]:
    """The tasks that the data has, in GLUE's order of the release."""
    if data_dir is None or data_dir == MINI_GLUE:
        return [*TASKS]
    return [name for name in TASKS if (Path(data_dir) / name).is_dir()]


def load_task(
    task: GlueTask, data_dir: str | None, validation_only: bool = False
) -> dict[str, Dataset]:
    """{"train", "validation"[, "validation_mm"]} of a task, checked.

    Args:
        data_dir: a folder (see --data-dir), "mini-glue" for the embedded data, None for the hub.
        validation_only: leave "train" out; it need not be there.

    Raises:
        UserError: no such data, a missing column, labels out of range, what should be text is not.
    """
    if data_dir == MINI_GLUE:
        data_dir = str(embedded.mini_glue())
    splits = {} if validation_only else {"train": "train"}
    splits |= {f"validation{end}": split for end, split in task.validation_splits.items()}
    loaded = {}
    source: str | Path
    if data_dir is None:
        source, found = f"{HUB_DATA} {task.name}", _load_from_hub(task)
    else:
        source = Path(data_dir) / task.name
        if not source.is_dir():
            raise UserError(f"--data-dir {data_dir}: no folder '{task.name}' in it; add {source}")
        found = _load_folder(source, splits.values())
    for name, split in splits.items():
        if split in found:
            loaded[name] = _checked(task, found[split], f"{source} {split}")
            if name == "train" and len(loaded[name]) < 2:
                raise UserError(f"{source} {split}: holds one example; add more, one is held out")
        elif name != "validation_mm":
            raise UserError(
                f"{source}: no split '{split}'; add {split}.parquet, .jsonl, .csv or .tsv"
            )
    return loaded


def _load_from_hub(task: GlueTask) -> Mapping[str, Dataset]:
    try:
        return datasets.load_dataset(HUB_DATA, task.name)
    except (OSError, ValueError) as error:
        raise UserError(
            f"GLUE ({HUB_DATA}, {task.name}) is neither on the hub nor cached here"
            f" ({first_line(error)});"
            " give --data-dir DIR, or use the embedded data: --data-dir mini-glue"
        ) from None


def _load_folder(folder: Path, splits: Iterable[str]) -> Mapping[str, Dataset]:
    if (folder / "dataset_dict.json").exists():
        try:
            # In memory: else what is derived from it is cached in the user's own folder.
            saved = DatasetDict.load_from_disk(str(folder), keep_in_memory=True)
            for split in saved.values():
                split.data.validate(full=True)  # a forged one would crash Python later
            # All columns, as Python's objects, whatever format they were saved with.
            return saved.with_format(None)
        except (
            *(OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError),
        ) as error:
            raise UserError(
                f"{folder}: not readable as a save_to_disk folder ({first_line(error)}); save it"
                " again"
            ) from None
    found = {}
    for split in splits:
        for ending, read in READERS.items():
            path = folder / f"{split}.{ending}"
            if path.exists():
                try:
                    with warnings.catch_warnings():
                        warnings.simplefilter("error", ParserWarning)  # "loss of data"
                        found[split] = Dataset.from_pandas(read(path), preserve_index=False)
                except (OSError, ValueError, TypeError, ParserWarning) as error:
                    raise UserError(
                        f"{path}: not readable as {ending} ({first_line(error)}); mend the file"
                    ) from None
                break
    return found


def _checked(task: GlueTask, dataset: Dataset, where: str) -> Dataset:
    """The dataset, reduced to the task's columns; labels are in range, texts are texts."""
    lacking = [name for name in (*task.fields, "label") if name not in dataset.column_names]
    if lacking:
        raise UserError(
            f"{where}: lacks the column {', '.join(lacking)}; {task.name} has"
            f" {', '.join((*task.fields, 'label'))}"
        )
    if not len(dataset):
        raise UserError(f"{where}: holds no examples")
    dataset = dataset.select_columns([*task.fields, "label"])
    for name in task.fields:
        for row, text in enumerate(dataset[name][:]):
            if not isinstance(text, str):
                raise UserError(
                    f"{where}: row {row}, column '{name}': expected text, found {text!r}"
                )
    given = pd.Series(dataset["label"][:], dtype=object)
    labels = pd.to_numeric(given, errors="coerce").to_numpy(np.float64)  # NaN: no number
    expected: object
    if task.labels:
        wrong, expected = ~np.isin(labels, range(len(task.labels))), dict(enumerate(task.labels))
    else:
        wrong, expected = ~((labels >= 0) & (labels <= 5)), "0 to 5"
    if wrong.any():
        row = int(wrong.argmax())
        raise UserError(
            f"{where}: row {row}, column 'label': expected {expected}, found"
            f" {dataset[row]['label']!r}"
        )
    kind = datasets.Value("int64" if task.labels else "float32")
    return dataset.remove_columns("label").add_column(
        "label", labels.astype(kind.dtype), feature=kind
    )


@dataclass(frozen=True)
class TaskData:
    """The examples of one task in one run.

    `selection` chooses the best epoch; `validation` is what is reported, by metric suffix.
    """

    train: Dataset
    selection: Dataset
    validation: dict[str, Dataset]


def split_task(
    loaded: Mapping[str, Dataset],
    seed: int,
    max_train: int = -1,
    max_selection: int = -1,
    max_validation: int = -1,
    select_on: str = "held-out",
) -> TaskData:
    """Shuffle, hold out 10 % of the training data for selection, and truncate (< 0: do not).

    The held-out examples depend on the seed alone, never on `max_train`: no run with that seed
    trains on them.
    """
    validation = validation_splits(loaded, max_validation, seed)
    train = loaded["train"].shuffle(seed=seed)
    if select_on == "validation":
        return TaskData(_first(train, max_train), validation[""], validation)
    held_out = max(1, len(train) // 10)
    selection = train.select(range(held_out))
    rest = train.select(range(held_out, len(train)))
    return TaskData(_first(rest, max_train), _first(selection, max_selection), validation)


def validation_splits(loaded: Mapping[str, Dataset], most: int, seed: int) -> dict[str, Dataset]:
    """{suffix: examples} of what is reported: all of them, or `most` drawn with the seed."""
    return {
        name.removeprefix("validation"): _first(split, most, seed)
        for name, split in loaded.items()
        if name != "train"
    }


def _first(dataset: Dataset, most: int, seed: int | None = None) -> Dataset:
    if most < 0 or most >= len(dataset):
        return dataset
    return (dataset if seed is None else dataset.shuffle(seed=seed)).select(range(most))


def tokenize(dataset: Dataset, task: GlueTask, tokenizer: Any, max_seq_len: int) -> Dataset:
    """Token ids, `labels` and `length` of every example, not padded; left truncation."""

    def encode(batch: Mapping[str, list]) -> dict[str, Any]:
        encoded = tokenizer(
            *[batch[name] for name in task.fields], truncation=True, max_length=max_seq_len
        )
        lengths = [len(ids) for ids in encoded["input_ids"]]
        return {**encoded, "labels": batch["label"], "length": lengths}

    _show_bars(len(dataset))
    title = f"tokenise {task.name}"
    return dataset.map(encode, batched=True, remove_columns=dataset.column_names, desc=title)


def _show_bars(examples: int) -> None:
    """Bars for what takes seconds; those of the many small calls would fill the screen."""
    if examples > 20_000:
        datasets.enable_progress_bars()
    else:
        datasets.disable_progress_bars()


def collator(tokenizer: Any, pad_to: int | None = None) -> Callable[[list[dict]], Any]:
    """Tokenised examples -> a batch, padded to its longest example (or to `pad_to` tokens)."""
    pad = DataCollatorWithPadding(
        tokenizer, padding="max_length" if pad_to else True, max_length=pad_to
    )

    def collate(examples: list[dict]) -> Any:
        return pad([{k: v for k, v in each.items() if k != "length"} for each in examples])

    return collate


def feature_batches(
    encoded: Dataset, tokenizer: Any, batch_size: int, pad_to: int | None
) -> DataLoader:
    """Tokenised examples as batches of the model's arguments without labels, of alike lengths.

    Of several processes each has its share of them.
    """
    batches = batches_by_length(encoded["length"][:], batch_size)
    return DataLoader(
        encoded.remove_columns("labels"),
        batch_sampler=batches[processes.rank() :: processes.count()],
        collate_fn=collator(tokenizer, pad_to),
    )


def fingerprint(dataset: Dataset) -> str:
    """A hash of the content, the same wherever and however the data was stored."""
    digest = hashlib.sha256()
    for name in sorted(dataset.column_names):
        digest.update("\0".join(map(repr, [name, *dataset[name][:]])).encode())
    return digest.hexdigest()[:16]
