"""GLUE's scores against scikit-learn and scipy, and its data in and out of every format."""

import csv
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from osrm.backbones import find_backbone, load_tokenizer
from osrm.data import (
    available_tasks,
    collator,
    find_tasks,
    fingerprint,
    load_task,
    split_task,
    tokenize,
)
from osrm.errors import UserError
from osrm.glue import TASKS, task_metrics, task_scores
from osrm.metrics import METRICS
from tests.conftest import WORDS

# -- scores ------------------------------------------------------------------------------------

ORACLES = {
    "accuracy": lambda predicted, true: accuracy_score(true, predicted),
    "f1": lambda predicted, true: f1_score(true, predicted, zero_division=0.0),
    "matthews_correlation": lambda predicted, true: matthews_corrcoef(true, predicted),
    "pearson": lambda predicted, true: pearsonr(predicted, true)[0],
    "spearmanr": lambda predicted, true: spearmanr(predicted, true)[0],
}
RUN_GLUE = {
    "mrpc": ("accuracy", "f1"),
    "qnli": ("accuracy",),
    "qqp": ("accuracy", "f1"),
    "rte": ("accuracy",),
    "sst2": ("accuracy",),
    "mnli": ("accuracy",),
    "cola": ("matthews_correlation",),
    "stsb": ("pearson", "spearmanr"),
}
"""task -> the names that run_glue.py reports; two of them have their mean as combined_score"""
IN_THE_TABLES = dict.fromkeys(("mrpc", "qqp", "stsb"), "combined_score") | {
    "cola": "matthews_correlation"
}
SELECTS = {"cola": "matthews_correlation", "stsb": "combined_score"}
LABELS = {"mnli": 3, "stsb": 1}


def random_outputs(task: str, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits that have something to do with the labels, and the labels."""
    rng = np.random.default_rng(seed)
    if task == "stsb":
        labels = rng.integers(0, 26, n) / 5
        return (labels + rng.normal(0, 2, n))[:, None].astype(np.float32), labels
    labels = rng.integers(0, LABELS.get(task, 2), n)
    logits = rng.normal(size=(n, LABELS.get(task, 2)))
    logits[np.arange(n), labels] += 0.7
    return logits.astype(np.float32), labels


def assert_scores(scores: dict[str, float], task: str, predicted, true) -> None:
    expected = {name: ORACLES[name](predicted, true) for name in RUN_GLUE[task]}
    if len(expected) == 2:
        expected["combined_score"] = sum(expected.values()) / 2
    assert scores == pytest.approx(expected, abs=1e-6)
    assert all(type(score) is float for score in scores.values())


@pytest.mark.filterwarnings("ignore:A single label was found")
@pytest.mark.parametrize("seed, n", [(0, 2), (1, 5), (2, 40), (3, 300)])
@pytest.mark.parametrize("task", TASKS)
def test_scores_against_sklearn_and_scipy(task, seed, n):
    logits, labels = random_outputs(task, n, seed)
    predicted = logits[:, 0] if task == "stsb" else logits.argmax(-1)
    assert_scores(task_scores(TASKS[task], predicted, labels), task, predicted, labels)
    assert_scores(task_metrics(TASKS[task], logits, labels), task, predicted, labels)


@pytest.mark.parametrize("value", [0, 1])
@pytest.mark.parametrize("task", TASKS)
def test_constant_predictions(task, value):
    """An untrained head answers one label: no correlation, F1 of none, but never NaN."""
    true = np.array([0, 1, 1, 0, 1] if task != "stsb" else [0.0, 1.2, 3.4, 5.0, 1.2])
    scores = task_scores(TASKS[task], np.array([value] * 5), true)
    if task in ("cola", "stsb"):
        assert set(scores.values()) == {0.0}
    else:
        assert_scores(scores, task, [value] * 5, true)


def test_constant_truth():
    def scores(task: str, predicted: list[int], true: list[int]) -> dict[str, float]:
        return task_scores(TASKS[task], np.array(predicted), np.array(true))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert scores("cola", [0, 1], [1, 1]) == {"matthews_correlation": 0.0}
        assert set(scores("stsb", [0, 1], [1, 1]).values()) == {0.0}
        assert scores("mrpc", [0, 0], [0, 0]) == {"accuracy": 1.0, "f1": 0.0, "combined_score": 0.5}
        assert set(scores("stsb", [1], [2]).values()) == {0.0}, "one example"


@pytest.mark.parametrize("name", METRICS)
def test_many_scores_at_once_are_those_of_one_at_a_time(name):
    rng = np.random.default_rng(0)
    true = rng.integers(0, 26 if name in ("pearson", "spearmanr") else 2, (3, 4, 50))
    predicted = np.where(rng.random(true.shape) < 0.7, true, true.max() - true)
    predicted[0, 0] = 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = METRICS[name](predicted, true)
    assert scores.shape == (3, 4) and scores[1, 1] > 0
    for index in np.ndindex(3, 4):
        one = METRICS[name](predicted[index], true[index])
        assert scores[index] == pytest.approx(float(one), rel=1e-12)
        if index != (0, 0):
            assert one == pytest.approx(ORACLES[name](predicted[index], true[index]), rel=1e-12)


def test_rows_of_the_table():
    assert list(TASKS) == list(RUN_GLUE), "the release's order"
    for name, row in TASKS.items():
        assert row.metrics == RUN_GLUE[name]
        assert row.num_labels == LABELS.get(name, 2)
        assert row.score == IN_THE_TABLES.get(name, "accuracy")
        assert row.select == SELECTS.get(name, "accuracy")
        assert row.select in (*row.metrics, "combined_score")
    assert TASKS["mnli"].validation_splits == {
        "": "validation_matched",
        "_mm": "validation_mismatched",
    }


def test_find_tasks():
    found = find_tasks(["rte", "cola", "rte"], "--tasks", None)
    assert [task.name for task in found] == ["rte", "cola"]
    with pytest.raises(UserError, match=r"--tasks: unknown task wnli, ax;.*stsb"):
        find_tasks(["wnli", "rte", "ax"], "--tasks", None)


# -- files -------------------------------------------------------------------------------------

ODD_TEXTS = [
    "NA",
    "null",
    "None",
    "nan",
    "true",
    "1.50",
    "007",
    "2020-01-31",
    'She said "no", twice.',
    '"',
    "a, b; c",
    "one\ttab",
    "two\nlines",
    "  spaces around  ",
    "back\\slash \\n \\t",
    "naïve café — 日本語 🙂",
    "it's #1",
    "-",
]


def write(folder: Path, ending: str, splits: dict[str, pd.DataFrame]) -> None:
    """The splits of one task in one format."""
    folder.mkdir(parents=True)
    if ending == "save_to_disk":
        DatasetDict({k: Dataset.from_pandas(v) for k, v in splits.items()}).save_to_disk(folder)
        return
    for split, frame in splits.items():
        path = folder / f"{split}.{ending}"
        if ending == "parquet":
            frame.to_parquet(path)
        elif ending == "jsonl":
            frame.to_json(path, orient="records", lines=True)
        else:
            frame.to_csv(path, sep="," if ending == "csv" else "\t", index=False)


def odd_frame(task: str) -> pd.DataFrame:
    """One odd text a row, in every field, and a column that nobody asked for."""
    n = len(ODD_TEXTS)
    columns: dict[str, list] = {
        field: ODD_TEXTS[i:] + ODD_TEXTS[:i] for i, field in enumerate(TASKS[task].fields)
    }
    labels = [round(5 * i / (n - 1), 2) for i in range(n)]
    columns["label"] = labels if task == "stsb" else [i % LABELS.get(task, 2) for i in range(n)]
    return pd.DataFrame({"idx": range(n), **columns})


@pytest.mark.parametrize("ending", ["parquet", "jsonl", "csv", "tsv", "save_to_disk"])
@pytest.mark.parametrize("task", ["rte", "sst2", "stsb"])
def test_every_format_gives_the_same_data(tmp_path, task, ending):
    frame = odd_frame(task)
    write(tmp_path / task, ending, {"train": frame, "validation": frame[:5]})
    loaded = load_task(TASKS[task], str(tmp_path))
    assert list(loaded) == ["train", "validation"]
    assert [len(split) for split in loaded.values()] == [len(frame), 5]
    found = loaded["train"]
    assert [*found] == [*TASKS[task].fields, "label"]
    for field in TASKS[task].fields:
        assert found[field].tolist() == frame[field].tolist()
    assert found["label"].tolist() == pytest.approx(frame["label"].tolist())
    assert found["label"].dtype == ("float32" if task == "stsb" else "int64")
    # Nor does a fingerprint know where the data came from.
    plain = pd.DataFrame({name: found[name].tolist() for name in found})
    assert fingerprint(found) == fingerprint(plain)


@pytest.mark.parametrize("ending", ["csv", "tsv"])
@pytest.mark.parametrize("texts", [["7", "42", "3.5"], ["NA", "NA", "NA"], ["true"] * 3])
def test_texts_that_all_look_like_numbers(tmp_path, ending, texts):
    frame = pd.DataFrame({"sentence": texts, "label": [0, 1, 0]})
    write(tmp_path / "sst2", ending, {"train": frame, "validation": frame})
    assert load_task(TASKS["sst2"], str(tmp_path))["train"]["sentence"].tolist() == texts


def test_quoted_as_by_other_programs(tmp_path):
    """All fields quoted, labels too, and Windows' line ends."""
    for split in ("train", "validation"):
        path = tmp_path / "sst2" / f"{split}.csv"
        path.parent.mkdir(exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, quoting=csv.QUOTE_ALL, lineterminator="\r\n")
            writer.writerows([["sentence", "label"], *((text, "1") for text in ODD_TEXTS)])
    found = load_task(TASKS["sst2"], str(tmp_path))["train"]
    assert found["sentence"].tolist() == ODD_TEXTS and set(found["label"]) == {1}


def test_nothing_is_written_beside_the_data(tmp_path, tiny):
    frame = odd_frame("sst2")
    write(tmp_path / "sst2", "save_to_disk", {"train": frame, "validation": frame})
    before = sorted(tmp_path.rglob("*"))
    data = split_task(load_task(TASKS["sst2"], str(tmp_path)), seed=0, max_train=5)
    tokenize(data.train, TASKS["sst2"], load_tokenizer(find_backbone(str(tiny["bert"]))), 16)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("offsets", "text"),
    [([0, 3, 9_999_999, 9], b"abcdefghi"), ([0, 3, 6, 9], b"\xff\xfe\xfddefghi")],
    ids=["beyond the text", "no UTF-8"],
)
def test_a_forged_save_to_disk_folder_is_one_line(tmp_path, offsets, text):
    """Arrow's own reader believes the offsets of a file: Python would crash."""
    good = Dataset.from_dict({"sentence": ["abc", "def", "ghi"], "label": [0, 1, 0]})
    DatasetDict({"train": good, "validation": good}).save_to_disk(tmp_path / "sst2")
    (path,) = (tmp_path / "sst2" / "train").glob("*.arrow")
    table = pa.ipc.open_stream(path).read_all()
    buffers = [None, pa.py_buffer(np.array(offsets, np.int32)), pa.py_buffer(text)]
    forged = table.set_column(0, "sentence", pa.Array.from_buffers(pa.string(), 3, buffers))
    with pa.ipc.new_stream(str(path), forged.schema) as file:
        file.write_table(forged)
    with pytest.raises(UserError, match="not readable as a save_to_disk folder"):
        load_task(TASKS["sst2"], str(tmp_path))


def test_the_hubs_data_is_that_of_a_folder(tmp_path, monkeypatch):
    """With what GLUE has there: labels with names, and a test split without labels."""
    frame = odd_frame("sst2")
    write(tmp_path / "sst2", "parquet", {"train": frame, "validation": frame[:5]})
    splits = {"train": frame, "validation": frame[:5], "test": frame.assign(label=-1)}
    stored = DatasetDict({name: Dataset.from_pandas(each) for name, each in splits.items()})
    stored = stored.cast_column("label", ClassLabel(names=["negative", "positive"]))
    monkeypatch.setattr("datasets.load_dataset", lambda *_: stored)
    hub, folder = (load_task(TASKS["sst2"], place) for place in (None, str(tmp_path)))
    assert [*hub] == [*folder] == ["train", "validation"]
    assert all(hub[split].equals(folder[split]) for split in hub)


@pytest.mark.parametrize("mismatched", [True, False])
def test_mnli_with_and_without_mismatched(tmp_path, mismatched):
    frame = odd_frame("mnli")
    splits = {"train": frame, "validation_matched": frame[:4]}
    if mismatched:
        splits["validation_mismatched"] = frame[4:9]
    write(tmp_path / "mnli", "parquet", splits)
    loaded = load_task(TASKS["mnli"], str(tmp_path))
    data = split_task(loaded, seed=0)
    sizes = {suffix: len(split) for suffix, split in data.validation.items()}
    assert sizes == ({"": 4, "_mm": 5} if mismatched else {"": 4})
    assert set(loaded["train"]["label"]) == {0, 1, 2}


def test_available_tasks(tmp_path, tiny_data):
    assert available_tasks(str(tiny_data)) == ["rte", "sst2", "stsb"]
    assert available_tasks(str(tmp_path)) == []
    assert available_tasks(None) == available_tasks("mini-glue") == list(TASKS)


# -- splits ------------------------------------------------------------------------------------


def numbered(n: int = 100, validation: int = 30) -> dict[str, pd.DataFrame]:
    """Every text is its own; labels are sorted, as in a careless file."""

    def split(name: str, count: int) -> pd.DataFrame:
        texts = [f"{name} {i}" for i in range(count)]
        return pd.DataFrame({"sentence": texts, "label": [i * 2 // count for i in range(count)]})

    return {"train": split("train", n), "validation": split("validation", validation)}


def test_held_out_examples_are_no_training_examples():
    data = split_task(numbered(), seed=1)
    train, held_out = set(data.train["sentence"]), set(data.selection["sentence"])
    assert len(train) == 90 and len(held_out) == 10
    assert not train & held_out
    assert train | held_out == set(numbered()["train"]["sentence"])
    assert data.validation[""].equals(numbered()["validation"])


@pytest.mark.parametrize("max_train", [0, 1, 7, 50, 89, 90, 91, 10**6, -1])
def test_held_out_examples_depend_on_the_seed_alone(max_train):
    def held_out(seed: int, max_train: int) -> set[str]:
        return set(split_task(numbered(), seed, max_train).selection["sentence"])

    assert held_out(1, max_train) == held_out(1, -1)
    assert held_out(1, max_train) != held_out(2, max_train)


@pytest.mark.parametrize("max_train", [7, 50, -1])
def test_no_smaller_run_trains_on_what_selects_in_a_larger_one(max_train):
    small, large = (split_task(numbered(), 3, most) for most in (max_train, -1))
    assert not {*small.train["sentence"]} & {*large.selection["sentence"]}
    assert {*small.train["sentence"]} <= {*large.train["sentence"]}


def test_truncation_shuffles():
    data = split_task(
        numbered(), seed=0, max_train=20, max_selection=5, max_validation=12, select_on="held-out"
    )
    sizes = (len(data.train), len(data.selection), len(data.validation[""]))
    assert sizes == (20, 5, 12)
    assert set(data.train["label"]) == set(data.validation[""]["label"]) == {0, 1}
    again, other = (split_task(numbered(), seed, 20).train for seed in (0, 1))
    assert data.train.equals(again) and not data.train.equals(other)


@pytest.mark.parametrize("seed", [0, 1, 42, 2**40])
def test_examples_are_drawn_as_datasets_draws_them(seed):
    loaded = numbered(97, 31)
    loaded["train"].index = loaded["train"].index[::-1] + 0.5  # of a file, for what it is worth
    data = split_task(loaded, seed, 50, max_validation=12)
    train, validation = (
        Dataset.from_pandas(loaded[split]).shuffle(seed=seed)["sentence"][:]
        for split in ("train", "validation")
    )
    assert data.selection["sentence"].tolist() == train[:9]
    assert data.train["sentence"].tolist() == train[9:59]
    assert data.validation[""]["sentence"].tolist() == validation[:12]


def test_selection_on_validation_is_the_release():
    data = split_task(numbered(), seed=1, max_train=20, select_on="validation")
    assert len(data.train) == 20 and set(data.train["label"]) == {0, 1}
    assert data.selection.equals(data.validation[""])
    whole = split_task(numbered(), seed=1, select_on="validation")
    assert len(whole.train) == 100, "nothing is held out"


def test_a_split_that_selects_is_used_as_it_is():
    loaded = {
        **numbered(),
        "selection": numbered(30)["train"].replace("train", "selection", regex=True),
    }
    data = split_task(loaded, 1, max_selection=20)
    assert {*data.train["sentence"]} == {*loaded["train"]["sentence"]}
    assert {*data.selection["sentence"]} < {*loaded["selection"]["sentence"]}
    assert len(data.selection) == 20 and set(data.selection["label"]) == {0, 1}
    assert not data.selection.equals(split_task(loaded, 2, max_selection=20).selection)
    assert [*data.validation] == [""] and len(data.validation[""]) == 30


def test_two_examples_can_be_split():
    data = split_task(numbered(2), seed=0)
    assert len(data.train) == len(data.selection) == 1


# -- tokens ------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["roberta", "t5", "llama"])
def tokenizer(request, tiny):
    return load_tokenizer(find_backbone(str(tiny[request.param])))


def sentences(*texts: str) -> pd.DataFrame:
    return pd.DataFrame({"sentence": list(texts), "label": [i % 2 for i in range(len(texts))]})


def test_truncation_keeps_the_end(tokenizer):
    data = sentences("cat " * 40 + "film dog", "good film")
    encoded = tokenize(data, TASKS["sst2"], tokenizer, 12)
    columns = encoded.datasets
    assert encoded.lengths == [len(ids) for ids in columns["input_ids"]]
    long, short = (tokenizer.decode(ids, skip_special_tokens=True) for ids in columns["input_ids"])
    assert encoded.lengths[0] == 12 and long.endswith("cat film dog")
    assert encoded.lengths[1] < 12 and short == "good film", "and nothing is padded"
    assert columns["labels"] == [0, 1]
    assert "sentence" not in columns


def test_both_texts_of_a_pair_are_read(tokenizer):
    data = pd.DataFrame({"sentence1": ["good dog"], "sentence2": ["bad cat"], "label": [0]})
    encoded = tokenize(data, TASKS["rte"], tokenizer, 32)
    text = tokenizer.decode(encoded[0]["input_ids"], skip_special_tokens=True)
    assert text == "good dog bad cat"


def test_every_example_is_tokenised_as_if_it_were_alone(tokenizer):
    texts = [" ".join(WORDS[: 1 + i % len(WORDS)]) for i in range(2300)]
    encoded = tokenize(sentences(*texts), TASKS["sst2"], tokenizer, 9)
    assert len(encoded) == len(texts)
    for i, text in enumerate(texts):
        expected = tokenizer(text, truncation=True, max_length=9)["input_ids"]
        assert encoded[i]["input_ids"].tolist() == expected
        assert encoded[i]["labels"] == i % 2


@pytest.mark.parametrize("pad_to, width", [(None, "longest"), (20, 20)])
def test_collator(tokenizer, pad_to, width):
    texts = ["a dog", "the very old film sleeps"]
    encoded = tokenize(sentences(*texts), TASKS["sst2"], tokenizer, 32)
    batch = collator(tokenizer, pad_to)([*encoded])
    padding = {"padding": "max_length" if pad_to else "longest", "max_length": pad_to}
    expected = tokenizer(texts, **padding, return_tensors="pt")
    assert {*batch} == {*expected, "labels"} == {"input_ids", "attention_mask", "labels"}
    for name, tensor in expected.items():
        assert torch.equal(batch[name], tensor) and batch[name].dtype == torch.int64
    lengths = encoded.lengths
    assert batch["input_ids"].shape == (2, max(lengths) if width == "longest" else width)
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert batch["attention_mask"][0, : lengths[0]].all(), "padding is on the right"
    assert torch.equal(batch["labels"], torch.tensor([0, 1]))


def test_values_of_a_regression_stay_float32(tokenizer, tmp_path):
    frame = odd_frame("stsb")
    write(tmp_path / "stsb", "jsonl", {"train": frame, "validation": frame})
    data = load_task(TASKS["stsb"], str(tmp_path))["train"]
    batch = collator(tokenizer)([*tokenize(data, TASKS["stsb"], tokenizer, 32)])
    assert torch.equal(batch["labels"], torch.tensor(frame["label"], dtype=torch.float32))


# -- fingerprints ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed",
    [
        sentences("a dog", "a cat."),
        sentences("a dog ", "a cat"),
        sentences("a dog", "a cat", "a dog"),
        sentences("a cat", "a dog"),
        pd.DataFrame({"sentence": ["a dog", "a cat"], "label": [0, 0]}),
        pd.DataFrame({"sentence1": ["a dog", "a cat"], "label": [0, 1]}),
    ],
    ids=["character", "space", "row", "order", "label", "column"],
)
def test_fingerprint_sees_every_change(changed):
    assert fingerprint(changed) != fingerprint(sentences("a dog", "a cat"))


def test_fingerprints_of_finished_runs_stay():
    """They stand in args.json. These are of Python's values in Arrow tables, column by column."""
    data = sentences("a dog", 'it\'s a "cat" 🙂')
    assert fingerprint(data) == "18611723338f1d50"
    values = np.array([3.8, 5], np.float32)
    data = pd.DataFrame({"sentence1": ["a dog", "x"], "sentence2": ["a", "é"], "label": values})
    assert fingerprint(data) == "a4ecb4f92ef5fea4"


def test_fingerprint_is_of_the_content():
    data = sentences("a dog", "a cat")
    assert fingerprint(data) == fingerprint(data[["label", "sentence"]])
    assert fingerprint(data) == fingerprint(sentences("x", "y", "a dog", "a cat").tail(2))
