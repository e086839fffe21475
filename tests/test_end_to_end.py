"""The real embedded model on the real embedded text, through the scripts as a user runs them."""

import json
from pathlib import Path

import pytest

from tests.conftest import Forked

TASKS = ["mrpc", "sst2"]


def script(folder: Path, name: str, *arguments: object, fails: bool = False) -> str:
    """Run a script; what it prints."""
    code, output = Forked(folder, name, *arguments).wait()
    assert (code != 0) == fails, output[-3000:]
    return output


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Two tasks trained from OSRM's start for forty steps."""
    out = tmp_path_factory.mktemp("real")
    arguments = ["--backbone", "minilm", "--tasks", *TASKS, "--init", "analytical"]
    arguments += ["--other-tasks", "mrpc", "sst2", "cola", "--max-seq-len", "64"]
    arguments += ["--epochs", "2", "--lr", "3e-3", "--per-device-train-bsz", "32"]
    arguments += ["--max-train-samples", "640", "--max-eval-samples", "100"]
    arguments += ["--max-test-samples", "200", "--output-dir", str(out)]
    arguments += ["--dtype", "bfloat16"]
    printed = tmp_path_factory.mktemp("printed")
    script(printed / "1", "train_glue.py", *arguments)
    script(printed / "2", "train_glue.py", *arguments, "--resume")  # nothing is done again
    assert "--resume" in script(printed / "3", "train_glue.py", *arguments, fails=True)
    return out


def test_train_merge_and_load(trained, tmp_path):
    name = "minilm-r8-a16-analytical-fixN-qv-wd0.0-seq64-100"
    metrics = {
        task: json.loads((trained / task / name / "metrics.json").read_text()) for task in TASKS
    }
    # Guessing scores .53 and .50, with a standard error of .035.
    assert metrics["mrpc"]["eval_accuracy"] > 0.65
    assert metrics["sst2"]["eval_accuracy"] > 0.62

    paths = trained / f"load_model_path-{name}.json"
    out = tmp_path / "merged"
    options = ["--methods", "task_arithmetic", "regmean", "emr", "--eval-dtype", "bfloat16"]
    options += ["--load-model-path", paths, "--output-dir", out]
    table = script(tmp_path / "printed", "merge.py", *options)
    assert "| analytical | individual" in table and "emr" in table
    rows = {row["name"]: row for row in json.loads((out / "results.json").read_text())["rows"]}
    assert rows["individual"]["normalised_average"] == pytest.approx(1)
    assert rows["individual"]["average"] > rows["pre-trained"]["average"] + 0.05
    assert rows["emr"]["average"] > rows["pre-trained"]["average"]

    import torch

    from osrm import load_merged
    from osrm.backbones import find_backbone, load_tokenizer

    model = load_merged(out / "emr", "mrpc")
    tokenizer = load_tokenizer(find_backbone("minilm"))
    pairs = [
        ("A man plays a guitar.", "A man is playing the guitar."),
        ("A dog runs.", "It rains."),
    ]
    batch = tokenizer(*zip(*pairs), padding=True, return_tensors="pt")
    with torch.no_grad():
        equivalent = model(**batch).logits.softmax(-1)[:, 1]
    assert equivalent[0] > equivalent[1] + 0.1


def test_a_fitted_head_gives_more_of_what_the_own_model_gives(trained, tmp_path):
    """On reported texts, by which nothing was trained or fitted."""
    import torch
    from peft import AutoPeftModelForSequenceClassification

    from osrm import load_merged
    from osrm.backbones import find_backbone, load_tokenizer
    from osrm.data import load_task
    from osrm.glue import TASKS as KNOWN

    (paths,) = trained.glob("load_model_path-*.json")
    options = ["--load-model-path", paths, "--methods", "task_arithmetic", "--scale", "1"]
    fitting = ["--align-heads", "400", "--eval-dtype", "bfloat16", "--max-test-samples", "50"]
    for name, more in ("plain", ["--no-eval"]), ("fitted", fitting):
        script(
            tmp_path / f"{name}-printed",
            "merge.py",
            *options,
            *more,
            "--output-dir",
            tmp_path / name,
        )
    tokenizer = load_tokenizer(find_backbone("minilm"))
    for name in TASKS:
        task, run = KNOWN[name], json.loads(paths.read_text())[name]
        texts = load_task(task, "mini-glue")["validation"].head(200)
        columns = [texts[field].tolist() for field in task.fields]
        batch = tokenizer(*columns, padding=True, truncation=True, return_tensors="pt")
        own = AutoPeftModelForSequenceClassification.from_pretrained(run, num_labels=2).eval()
        merges = [
            load_merged(tmp_path / each / "task_arithmetic", name) for each in ("plain", "fitted")
        ]
        with torch.no_grad():
            expected, *found = (model(**batch).logits for model in (own, *merges))
        plain, fitted = ((logits - expected).square().mean() for logits in found)
        assert fitted < 0.9 * plain
