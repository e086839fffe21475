"""tasks.json: labelled text of one's own, trained, merged and scored beside GLUE's tasks."""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from peft import AutoPeftModelForSequenceClassification
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score
from transformers import AutoModelForSequenceClassification

from osrm import load_merged
from osrm.commands.train import train
from osrm.data import available_tasks, find_tasks, load_task
from osrm.errors import UserError
from osrm.glue import TASKS
from osrm.runs import run_dir, run_name
from tests.conftest import WORDS, make_tokenizer, merge_them, small, write_data

SPAM = {"fields": ["text"], "labels": ["ham", "spam"], "metrics": ["accuracy", "f1"]}
QUALITY = {"fields": ["first", "second"], "labels": []}
FIELDS = {"rte": ["sentence1", "sentence2"], "spam": ["text"], "quality": ["first", "second"]}
CLASSES = {"rte": 2, "spam": 2, "quality": 1}


def write_own(folder: Path, name: str, values: list, **definitions: dict) -> Path:
    """tasks.json with these definitions, and data of the task `name`: is there a "good"?"""
    (folder / name).mkdir(parents=True)
    (folder / "tasks.json").write_text(json.dumps(definitions))
    for split, count in {"train": 60, "selection": 30, "validation": 41}.items():
        draw, rows = random.Random(f"{name} {split}"), []
        for _ in range(count):
            texts = [" ".join(draw.choices(WORDS, k=draw.randint(2, 8))) for _ in FIELDS[name]]
            good = any("good" in text.split() for text in texts)
            rows.append({**dict(zip(FIELDS[name], texts)), "label": values[good]})
        pd.DataFrame(rows).to_csv(folder / name / f"{split}.csv", index=False)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """rte and spam, and quality with another task of the name spam."""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    write_data(one, ["rte"], train=60, validation=24)
    write_own(one, "spam", [0, 1], spam=SPAM)
    write_own(
        two, "quality", [-100.5, 400], quality=QUALITY, spam={**SPAM, "labels": ["no", "yes"]}
    )
    shutil.copytree(one / "spam", two / "spam")
    return one, two


@pytest.fixture(scope="module")
def config(tiny, folders, tmp_path_factory):
    """The three tasks, trained in two commands with one --output-dir."""
    out = tmp_path_factory.mktemp("runs")
    (out / "epochs.json").write_text(json.dumps({"rte": 1, "spam": 2, "quality": 3}))
    more = {"init": "contrastive", "load_epochs": str(out / "epochs.json"), "seed": 3}
    more["feature_bank"] = str(out / "bank")
    train(small(tiny, folders[0], out, tasks=["rte", "spam"], **more))
    config = small(tiny, folders[1], out, tasks=["quality"], other_tasks=["spam", "rte"], **more)
    train(config)
    return config


def runs(config) -> dict[str, str]:
    """{task: run directory}, of the file that the last command has written."""
    file = Path(config.output_dir) / f"load_model_path-{run_name(config)}.json"
    return json.loads(file.read_text())


def predictions(model, task: str, folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Of one example at a time, with the true labels, by pandas and transformers alone."""
    path = folder / task / f"{split}.csv"
    frame = (
        pd.read_csv(path) if path.exists() else pd.read_json(path.with_suffix(".jsonl"), lines=True)
    )
    tokenizer, values = make_tokenizer("roberta"), []
    for texts in frame[FIELDS[task]].itertuples(index=False):
        with torch.no_grad():
            logits = model.eval()(**tokenizer(*texts, return_tensors="pt")).logits[0].numpy()
        values.append(logits.argmax() if CLASSES[task] > 1 else logits[0])
    return np.array(values), frame["label"].to_numpy()


def score(task: str, predicted: np.ndarray, true: np.ndarray) -> float:
    if task == "rte":
        return accuracy_score(true, predicted)
    if task == "spam":
        return (accuracy_score(true, predicted) + f1_score(true, predicted)) / 2
    return (pearsonr(predicted, true)[0] + spearmanr(predicted, true)[0]) / 2


def test_train_merge_and_scores(config, folders, tiny, tmp_path):
    places = {"rte": folders[0], "spam": folders[0], "quality": folders[1]}
    paths = runs(config)
    assert [*paths] == ["rte", "quality", "spam"], "the data's tasks, then those of other data"
    out = merge_them(paths, tmp_path, methods=["task_arithmetic"], search=[0.4, 0.8])
    results = json.loads((out / "results.json").read_text())
    rows = {row["name"]: row["scores"] for row in results["rows"]}
    search = results["search"]["task_arithmetic"]

    base = AutoModelForSequenceClassification.from_pretrained(tiny["roberta"]).state_dict()
    models, deltas = {}, {}
    for task, path in paths.items():
        adapter = AutoPeftModelForSequenceClassification.from_pretrained
        models[task] = adapter(path, num_labels=CLASSES[task]).merge_and_unload()
        own = models[task].state_dict()
        deltas[task] = {n: own[n] - base[n] for n in base if n.startswith("roberta")}

    table = pd.read_parquet(out / "predictions.parquet")
    for task, model in models.items():
        body = {name: base[name] + delta for name, delta in deltas[task].items()}
        merged = {
            scale: {
                name: base[name] + scale * sum(d[name] for d in deltas.values()) for name in body
            }
            for scale in search["grid"]
        }
        stored = table[table.task == task]
        for row, weights in {"individual": body, "task_arithmetic": merged[search["best"]]}.items():
            model.load_state_dict(weights, strict=False)
            predicted, true = predictions(model, task, places[task], "validation")
            np.testing.assert_allclose(stored[row], predicted, rtol=1e-5)
            np.testing.assert_array_equal(stored["label"], true.astype(np.float32))
            assert rows[row][task] == pytest.approx(score(task, stored[row], true), abs=1e-6)
        if task == "spam":
            for place, weights in enumerate(merged.values()):
                model.load_state_dict(weights, strict=False)
                held_out = score(task, *predictions(model, task, places[task], "selection"))
                assert search["scores"][task][place] == pytest.approx(held_out, abs=1e-6)

    legend = "rte accuracy, quality combined score, spam combined score."
    assert legend in (out / "results.md").read_text()
    assert load_merged(out / "task_arithmetic", "spam").config.id2label == {0: "ham", 1: "spam"}
    assert load_merged(out / "task_arithmetic", "quality").config.problem_type == "regression"


def test_runs_need_the_definition_of_their_task(config, folders, tmp_path):
    """The folder that the run names has none; another one does, and --no-eval works without."""
    one = shutil.copytree(runs(config)["spam"], tmp_path / "run")
    args = json.loads((one / "args.json").read_text())
    gone = str(tmp_path / "gone")
    (one / "args.json").write_text(json.dumps({**args, "data_dir": gone}))
    paths, options = {"spam": one}, {"methods": ["average"]}
    with pytest.raises(
        UserError, match=rf"unknown task spam; .* of {gone} are .*'rte'.* tasks.json"
    ):
        merge_them(paths, tmp_path, **options)
    out = merge_them(paths, tmp_path, "there", data_dir=str(folders[0]), **options)
    same = merge_them({"spam": runs(config)["spam"]}, tmp_path, "as it was", **options)
    rows = [json.loads((each / "results.json").read_text())["rows"] for each in (out, same)]
    assert [row["metrics"] for row in rows[0]] == [row["metrics"] for row in rows[1]]
    out = merge_them(paths, tmp_path, "unscored", no_eval=True, **options)
    assert json.loads((out / "average/recipe.json").read_text())["tasks"]["spam"]["labels"] == [
        "LABEL_0",
        "LABEL_1",
    ]


def test_transform(config, folders):
    file = Path(config.output_dir) / f"load_model_path-{run_name(config)}.json"
    moved = replace(config, tasks=["quality"], load_model_path=str(file))
    train(moved)
    metrics = json.loads((run_dir(moved, "quality") / "metrics.json").read_text())
    assert {"source_eval_spearmanr", "eval_combined_score"} <= metrics.keys()


def test_the_datas_tasks(folders, tmp_path):
    assert available_tasks(str(folders[0])) == ["rte", "spam"]
    assert available_tasks(str(folders[1])) == ["quality", "spam"]
    (quality,) = find_tasks(["quality"], "--tasks", str(folders[1]))
    assert (quality.metrics, quality.num_labels) == (("pearson", "spearmanr"), 1)
    (tmp_path / "tasks.json").write_text(
        '{"nli": {"fields": ["a", "b"], "labels": ["x", "y", "z"]}}'
    )
    (nli,) = find_tasks(["nli"], "--tasks", str(tmp_path))
    assert (nli.fields, nli.metrics, nli.score) == (("a", "b"), ("accuracy",), "accuracy")
    same = {"fields": ["sentence1", "sentence2"], "labels": [], "metrics": ["pearson", "spearmanr"]}
    (tmp_path / "tasks.json").write_text(json.dumps({"stsb": same}))
    assert find_tasks(["stsb"], "--tasks", str(tmp_path)) == [TASKS["stsb"]]
    assert find_tasks(["stsb"], "--tasks", str(tmp_path))[0].values == (0, 5)


@pytest.mark.parametrize("value, holds", [(-3e38, True), (7, True), ("nan", False), (1e39, False)])
def test_a_regression_has_any_finite_label(tmp_path, value, holds):
    write_own(tmp_path, "quality", [value, 2], quality=QUALITY)
    (quality,) = find_tasks(["quality"], "--tasks", str(tmp_path))
    if holds:
        assert load_task(quality, str(tmp_path))["train"]["label"].min() == min(
            np.float32(value), 2
        )
    else:
        with pytest.raises(
            UserError, match=r"quality train: row \d+, column 'label': expected -3.4"
        ):
            load_task(quality, str(tmp_path))


def own(name: str = "spam", **changes: object) -> str:
    return json.dumps({name: {key: x for key, x in {**SPAM, **changes}.items() if x is not None}})


BAD_FILES = {
    "[]": ["expected an object {task"],
    "{": ["broken JSON"],
    '{"spam": []}': ["'spam'", "fields, labels and perhaps metrics"],
    own(labels=None): ["'spam'", "fields, labels and perhaps metrics"],
    own(metric=["f1"]): ["'spam'", "fields, labels and perhaps metrics"],
    own(metrics=["bleu"]): ["'spam'", "metrics", "accuracy, f1, matthews_correlation", "'bleu'"],
    own(metrics=["pearson"]): ["metrics", "'pearson'", "2 labels"],
    own(metrics=["f1"], labels=[]): ["metrics", "pearson, spearmanr", "'f1'", "0 labels"],
    own(metrics=["f1"], labels=["a", "b", "c"]): ["metrics", "one of accuracy", "'f1'"],
    own(metrics=["f1", "f1"]): ["metrics", "different"],
    own(metrics=[]): ["metrics", "at least one"],
    own(labels=["spam"]): ["labels", "several", "['spam']"],
    own(labels=["spam", "spam"]): ["labels", "different"],
    own(labels=[0, 1]): ["labels", "not empty", "[0, 1]"],
    own(labels=2): ["labels", "found 2"],
    own(fields=[]): ["fields", "one or two"],
    own(fields=["a", "b", "c"]): ["fields", "one or two"],
    own(fields=["text", "label"]): ["fields", "other than 'label'"],
    own(fields=["text", "text"]): ["fields", "different"],
    own(fields="text"): ["fields", "found 'text'"],
    own("../spam"): ["'../spam'", "the name", "letters, digits"],
    own("rte"): ["'rte'", "GLUE has another task of this name"],
    own(labels=["a"])[:-1] + ", " + own("x y")[1:]: ["'spam': labels", "'x y': the name"],
    own("letters"): ["no folder 'letters'", "add"],
}


@pytest.mark.parametrize("text", BAD_FILES)
def test_bad_files(refuse, tiny, folders, tmp_path, text):
    shutil.copytree(folders[0] / "spam", tmp_path / "data" / "spam")
    (tmp_path / "data" / "tasks.json").write_text(text)
    refuse(
        "train_glue.py", ["--backbone", str(tiny["roberta"]), "--data-dir", "data"], BAD_FILES[text]
    )
