"""The data of the tasks: load, check, split, tokenise, batch."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from pandas.errors import ParserWarning
from torch.utils.data import DataLoader, StackDataset
from tqdm.auto import tqdm
from transformers import DataCollatorWithPadding

from osrm import embedded, processes
from osrm.errors import UserError, first_line
from osrm.glue import TASKS, GlueTask, read_tasks

HUB_DATA = "nyu-mll/glue"
Splits = Mapping[str, pd.DataFrame]  # {name: examples, with a column for each text and the label}

# All columns are text, because "NA" and "7" are sentences too; the first column is no index.
_read_csv = partial(pd.read_csv, dtype=str, keep_default_na=False, index_col=False)
_read_jsonl = partial(pd.read_json, lines=True, dtype=False)
READERS = {"parquet": pd.read_parquet, "jsonl": _read_jsonl, "csv": _read_csv}
READERS["tsv"] = partial(_read_csv, sep="\t")


def known_tasks(data_dir: str | None) -> dict[str, GlueTask]:
    """GLUE's tasks, in the release's order, and those of the data's tasks.json."""
    if data_dir is None:
        return TASKS
    data = embedded.DATA.get(data_dir)
    file = data.definitions if data else Path(data_dir, "tasks.json")
    return TASKS | read_tasks(file) if file and file.exists() else TASKS


def available_tasks(data_dir: str | None) -> list[str]:
    """The tasks that the data has: GLUE's with a folder, and all of its tasks.json."""
    if data_dir is None:
        return [*TASKS]
    if data := embedded.DATA.get(data_dir):
        return data.tasks
    folders, known = Path(data_dir), known_tasks(data_dir)
    return [name for name in known if name not in TASKS or (folders / name).is_dir()]


def find_tasks(names: Iterable[str], field: str, data_dir: str | None) -> list[GlueTask]:
    """The tasks of these names, each once; `field` names the origin of the names in errors."""
    names, known = list(dict.fromkeys(names)), known_tasks(data_dir)
    if unknown := [name for name in names if name not in known]:
        raise UserError(
            f"{field}: unknown task {', '.join(unknown)}; the tasks of {data_dir or HUB_DATA} are"
            f" {[*known]}, and a --data-dir adds others in its tasks.json"
        )
    return [known[name] for name in names]


def load_task(task: GlueTask, data_dir: str | None, validation_only: bool = False) -> Splits:
    """{"train"[, "selection"], "validation"[, "validation_mm"]}; the last if `validation_only`.

    `data_dir` is a folder (see --data-dir), the name of embedded data, or None for the hub.
    Raises UserError for missing data or columns, labels out of range, texts that are no text.
    """
    splits = {} if validation_only else {"train": "train", "selection": "selection"}
    splits |= {f"validation{end}": split for end, split in task.validation_splits.items()}
    if data_dir is None:
        source = f"{HUB_DATA} {task.name}"
        hub = _datasets(source)
        try:
            stored = _frames(hub.load_dataset(HUB_DATA, task.name))
        except (OSError, ValueError) as error:
            raise UserError(
                f"{source} is neither on the hub nor cached here ({first_line(error)}); give"
                " --data-dir DIR, or use the embedded data: --data-dir mini-glue"
            ) from None
    else:
        data = embedded.DATA.get(data_dir)
        folder = (data.build() if data else Path(data_dir)) / task.name
        if not folder.is_dir():
            raise UserError(f"--data-dir {data_dir}: no folder '{task.name}' in it; add {folder}")
        source, stored = str(folder), _load_folder(folder, splits.values())
    loaded = {}
    for name, split in splits.items():
        if split in stored:
            loaded[name] = _checked(task, stored[split], f"{source} {split}")
        elif name not in {"selection", "validation_mm"}:
            files = f"{split}.parquet, .jsonl, .csv or .tsv"
            raise UserError(f"{source}: no split '{split}'; add {files}")
    if "train" in loaded and len(loaded["train"]) < 2:
        raise UserError(f"{source} train: holds one example; add more, one is held out")
    return loaded


def _datasets(source: str) -> Any:
    """The package; nothing but the hub's data and save_to_disk folders needs it."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{source}: {first_line(error)}; pip install datasets") from None
    return datasets


def _frames(stored: Any) -> Splits:
    for split in stored.values():
        split.data.validate(full=True)  # wrong offsets would crash Python later
    return {name: split.to_pandas() for name, split in stored.items()}


def _load_folder(folder: Path, splits: Iterable[str]) -> Splits:
    if (folder / "dataset_dict.json").exists():
        saved = _datasets(str(folder)).DatasetDict
        with _readable(folder, "a save_to_disk folder"):
            return _frames(saved.load_from_disk(str(folder), keep_in_memory=True))
    stored: dict[str, pd.DataFrame] = {}
    for split, (ending, read) in product(splits, READERS.items()):
        path = folder / f"{split}.{ending}"
        if split not in stored and path.exists():
            with _readable(path, ending):
                stored[split] = read(path)
    return stored


@contextmanager
def _readable(path: Path, kind: str) -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", ParserWarning)  # pandas would drop fields
            yield
    except Exception as error:  # the readers raise many kinds for damaged files
        problem = f"{path}: not readable as {kind} ({first_line(error)})"
        raise UserError(f"{problem}; fix it, or save it again") from None


def _checked(task: GlueTask, frame: pd.DataFrame, where: str) -> pd.DataFrame:
    """The task's columns of the frame: texts that are text, labels in range."""
    columns = [*task.fields, "label"]
    if lacking := [name for name in columns if name not in frame]:
        problem = f"lacks the column {', '.join(lacking)}; {task.name} has {', '.join(columns)}"
        raise UserError(f"{where}: {problem}")
    if frame.empty:
        raise UserError(f"{where}: holds no examples")
    values = frame["label"].astype(object)
    labels = pd.to_numeric(values, errors="coerce").to_numpy(np.float64)  # NaN: no number
    checks: dict[str, tuple[object, Any]] = {}
    for name in task.fields:
        checks[name] = "text", [isinstance(text, str) for text in frame[name]]
    if task.labels:
        checks["label"] = dict(enumerate(task.labels)), np.isin(labels, range(len(task.labels)))
    else:
        low, high = task.values
        checks["label"] = f"{low:.3g} to {high:.3g}", (labels >= low) & (labels <= high)
    for name, (expected, holds) in checks.items():
        if not all(holds):
            row = list(holds).index(False)
            found = None if frame[name].isna().iloc[row] else frame[name].tolist()[row]
            problem = f"expected {expected}, found {found!r}"
            raise UserError(f"{where}: row {row}, column '{name}': {problem}")
    return frame[columns].assign(label=labels.astype(np.int64 if task.labels else np.float32))


class Encoded(StackDataset[dict[str, Any]]):
    """Tokenised examples: `labels`, `input_ids` (tokens,), perhaps `token_type_ids` (tokens,)."""

    datasets: dict[str, Any]  # {column: values}

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of each example."""
        return [*map(len, self.datasets["input_ids"])]


@dataclass(frozen=True)
class TaskData:
    """The examples of one task in one run: frames, or all `Encoded`."""

    train: Any
    selection: Any  # chooses the best epoch
    validation: Mapping[str, Any]  # reported, {suffix of the metrics: split}


def split_task(
    loaded: Splits,
    seed: int,
    max_train: int = -1,
    max_selection: int = -1,
    *,
    max_validation: int = -1,
    select_on: str = "held-out",
) -> TaskData:
    """Shuffle, and truncate (< 0: do not). What selects is "selection", or 10 % of "train".

    The held-out examples depend on the seed alone: no run with that seed trains on them.
    """
    validation = validation_splits(loaded, max_validation, seed)
    train = _shuffled(loaded["train"], seed)
    if select_on == "validation":
        return TaskData(_first(train, max_train), validation[""], validation)
    if "selection" in loaded:
        selection = _shuffled(loaded["selection"], seed)
    else:
        held_out = max(1, len(train) // 10)
        selection, train = train.iloc[:held_out], train.iloc[held_out:]
    return TaskData(_first(train, max_train), _first(selection, max_selection), validation)


def validation_splits(loaded: Splits, most: int, seed: int) -> Splits:
    """{suffix: reported examples}: all, or `most` of them drawn with the seed."""
    splits = {}
    for name, split in loaded.items():
        if name.startswith("validation"):
            drawn = _shuffled(split, seed) if 0 <= most < len(split) else split
            splits[name.removeprefix("validation")] = _first(drawn, most)
    return splits


def _shuffled(frame: pd.DataFrame, seed: int) -> pd.DataFrame:
    return frame.iloc[np.random.default_rng(seed).permutation(len(frame))]


def _first(frame: pd.DataFrame, most: int) -> pd.DataFrame:
    return frame if most < 0 else frame.head(most)


def tokenize(frame: pd.DataFrame, task: GlueTask, tokenizer: Any, max_seq_len: int) -> Encoded:
    """Every example without padding or mask, which the collator adds; truncated on the left."""
    texts = [frame[name].tolist() for name in task.fields]
    columns: dict[str, Any] = {"labels": frame["label"].tolist()}
    options = {"truncation": True, "max_length": max_seq_len, "return_attention_mask": False}
    # A bar for what takes seconds; those of the many small calls would fill the screen.
    title, quiet = f"tokenise {task.name}", len(frame) <= 20_000
    for start in tqdm(range(0, len(frame), 1000), title, unit="batch", disable=quiet):
        tokens = tokenizer(*(column[start : start + 1000] for column in texts), **options)
        for name, rows in tokens.items():  # arrays: a fifth of a list's memory
            columns.setdefault(name, []).extend(np.array(row, np.int32) for row in rows)
    return Encoded(**columns)


def collator(tokenizer: Any, pad_to: int | None = None) -> Callable[[list[dict]], Any]:
    """Tokenised examples -> a batch, padded to its longest example (or to `pad_to` tokens)."""
    return DataCollatorWithPadding(tokenizer, "max_length" if pad_to else "longest", pad_to)


def feature_batches(
    encoded: Encoded, tokenizer: Any, batch_size: int, pad_to: int | None
) -> DataLoader:
    """Batches of examples of similar lengths, without labels; this process's share of them."""
    batches = batches_by_length(encoded.lengths, batch_size)
    return DataLoader(
        Encoded(**{name: x for name, x in encoded.datasets.items() if name != "labels"}),
        batch_sampler=batches[processes.rank() :: processes.count()],
        collate_fn=collator(tokenizer, pad_to),
        pin_memory=torch.cuda.is_available(),
    )


def batches_by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices of each batch, whose longest example has at most 1.3 times the shortest's tokens."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        last = batches[-1] if batches else []
        if not 0 < len(last) < batch_size or lengths[index] > 1.3 * lengths[last[0]]:
            batches.append([])
        batches[-1].append(index)
    return batches


def fingerprint(frame: pd.DataFrame) -> str:
    """A hash of the content, the same for every file format and place."""
    digest = hashlib.sha256()
    for name in sorted(frame):
        digest.update("\0".join(map(repr, [name, *frame[name].tolist()])).encode())
    return digest.hexdigest()[:16]
