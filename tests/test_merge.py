"""merge.py: from run directories to merged models, scores and tables."""

import dataclasses
import gc
import json
import re
import weakref
from pathlib import Path

import pandas as pd
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification

from osrm import load_merged, report, session
from osrm.adapters import read_adapter
from osrm.alignment import head_change
from osrm.backbones import find_backbone, load_model, load_tokenizer
from osrm.checkpoints import load_adapters
from osrm.commands import merge as merge_command
from osrm.commands.train import train
from osrm.config import MergeConfig, TrainConfig
from osrm.data import load_task, split_task, tokenize
from osrm.errors import UserError
from osrm.evaluation import predict, predict_splits
from osrm.flags import parse
from osrm.glue import TASKS, task_scores
from osrm.merged import MergedUpdate
from osrm.merging import METHODS
from osrm.records import Row
from osrm.runs import run_dir
from tests.conftest import merge_them, written

NAMES = ["rte", "sst2", "stsb"]


@pytest.fixture(scope="module", params=["roberta", "t5", "llama"])
def runs(request, tiny, tiny_data, tmp_path_factory):
    """Three tiny tasks of one family, trained, with a dense model beside each adapter."""
    out = tmp_path_factory.mktemp(f"runs-{request.param}")
    config = TrainConfig(
        backbone=str(tiny[request.param]),
        data_dir=str(tiny_data),
        output_dir=str(out),
        rank=2,
        alpha=4,
        epochs=2,
        lr=1e-2,
        per_device_train_bsz=16,
        max_seq_len=32,
        save_merged_model=True,
    )
    train(config)
    return config


of_one_family = pytest.mark.parametrize("runs", ["roberta"], indirect=True)
others_in_sweeps = pytest.mark.parametrize(
    "runs",
    ["roberta", *(pytest.param(family, marks=pytest.mark.sweep) for family in ("t5", "llama"))],
    indirect=True,
)


def directories(config: TrainConfig, below: str = "") -> dict[str, str]:
    return {task: str(run_dir(config, task) / below) for task in NAMES}


def write(path: Path, value) -> str:
    path.write_text(json.dumps(value))
    return str(path)


def merged(config, tmp_path, name="out", **options) -> Path:
    paths = options.pop("paths", None) or directories(config)
    return merge_them(paths, tmp_path, name, **options)


@of_one_family
def test_one_model_is_in_memory_at_a_time(runs, tmp_path, monkeypatch):
    """Of the many that are loaded one after the other, for statistics, λ and scores."""
    alive = []

    def load(*args, **options):
        assert not any(each() for each in alive)
        model = load_model(*args, **options)
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr(session, "load_model", load)
    gc.disable()
    try:
        merged(runs, tmp_path, methods=["regmean", "fisher", "ties"], search=[0.5])
    finally:
        gc.enable()
    assert len(alive) == 4 * len(NAMES)  # for both statistics, λ and scores


def validation(config, task):
    data = split_task(load_task(TASKS[task], config.data_dir), config.seed).validation[""]
    tokenizer = load_tokenizer(find_backbone(config.backbone))
    return tokenize(data, TASKS[task], tokenizer, config.max_seq_len), tokenizer


def kept(config) -> float:
    """⟨average, own⟩ / ‖own‖², mean over the tasks, of dense updates."""
    updates = load_adapters(directories(config))
    products = torch.zeros(len(NAMES), 2)
    for module in updates:
        own = updates[module]
        products[:, 0] += (own * own.mean(0)).sum((1, 2))
        products[:, 1] += own.square().sum((1, 2))
    return float((products[:, 0] / products[:, 1]).mean())


def test_the_whole_journey(runs, tmp_path):
    out = merged(runs, tmp_path)
    results = json.loads((out / "results.json").read_text())
    rows = {row["name"]: row for row in results["rows"]}
    assert [*rows] == ["pre-trained", "individual", *METHODS]
    for task in NAMES:
        trained = json.loads((run_dir(runs, task) / "metrics.json").read_text())
        own = rows["individual"]["metrics"][task]
        # B A x against (W0 + B A) x: rounding shows in the correlation of near-constant outputs.
        assert own == pytest.approx({name: trained[name] for name in own}, abs=1e-4)
    for row in rows.values():
        scores, own = row["scores"], rows["individual"]["scores"]
        assert row["average"] == pytest.approx(sum(scores.values()) / 3)
        ratios = [scores[task] / own[task] for task in NAMES if own[task] > 0]
        assert row["normalised_average"] == pytest.approx(sum(ratios) / len(ratios))
    text = (out / "results.md").read_text()
    assert len(re.findall(r"^\| gaussian", text, re.MULTILINE)) == len(rows)
    for plot in ("results.png", "tasks.png"):
        assert (out / plot).read_bytes().startswith(b"\x89PNG")
    table = pd.read_csv(out / "results.csv").set_index("row")
    assert [*table.index] == [*rows]
    for name in METHODS:
        assert table.loc[name, "average"] == pytest.approx(rows[name]["average"])
        assert rows[name]["merge_peak_gib"] > 0 and rows[name]["size_mib"] > 0
    assert rows["regmean"]["condition"] > 1 and "condition numbers up to" in text
    assert rows["average"]["kept"] == pytest.approx(kept(runs), rel=1e-4)
    assert not list(tmp_path.glob(".*"))


def test_a_merged_model_is_base_plus_update_with_the_tasks_own_head(runs, tmp_path):
    """Through transformers alone: W0 + mean of what PEFT merges, and the trained head."""
    out = merged(runs, tmp_path, methods=["average", "emr"], no_eval=True)
    dense = {
        task: AutoModelForSequenceClassification.from_pretrained(path)
        for task, path in directories(runs, "merged_model").items()
    }
    for task in NAMES:
        model = load_merged(out / "average", task)
        assert model.config.num_labels == TASKS[task].num_labels and not model.training
        stacked = [model.base_model.state_dict() for model in dense.values()]
        for name, tensor in model.base_model.state_dict().items():
            mean = torch.stack([each[name].double() for each in stacked]).mean(0)
            torch.testing.assert_close(tensor.double(), mean, rtol=1e-5, atol=1e-6)
        heads = model.state_dict().keys() - {
            f"{model.base_model_prefix}.{name}" for name in model.base_model.state_dict()
        }
        assert heads
        for name in heads:
            assert torch.equal(model.state_dict()[name], dense[task].state_dict()[name])
    emr = {task: load_merged(out / "emr", task).base_model.state_dict() for task in NAMES}
    assert any(not torch.equal(emr["rte"][name], emr["sst2"][name]) for name in emr["rte"])


def test_the_scores_are_those_of_the_loaded_model(runs, tmp_path):
    out = merged(runs, tmp_path, methods=["ties"])
    row = json.loads((out / "results.json").read_text())["rows"][-1]
    for task in NAMES:
        data, tokenizer = validation(runs, task)
        logits, labels = predict(load_merged(out / "ties", task), data, tokenizer, 8, title=task)
        if task != "stsb":
            assert row["scores"][task] == pytest.approx((logits.argmax(-1) == labels).mean())


def head_features(model, data, tokenizer, count):
    """(n, d): what the head of each family reads, taken from the body's last hidden states."""
    rows = []
    for example in range(count):
        ids = torch.tensor(data[example]["input_ids"].astype("int64"))[None]
        with torch.no_grad():
            if model.config.model_type == "t5":  # </s> of the decoder, whose inputs are shifted
                shifted = torch.cat([ids.new_zeros(1, 1), ids[:, :-1]], 1)
                hidden = model.transformer(input_ids=ids, decoder_input_ids=shifted)[0]
            else:
                hidden = model.base_model(input_ids=ids)[0]
        rows.append(hidden[0, 0 if model.config.model_type == "roberta" else -1])
    return torch.stack(rows).double()


def test_align_heads_fits_the_first_layer_of_each_head(runs, tmp_path):
    """The expected head: body features of whole models, and `head_change`'s own equations."""
    methods = ["task_arithmetic", "emr", "regmean"]
    options = {"methods": methods, "max_num_samples": 5}
    plain = merged(runs, tmp_path, "plain", **options)
    out = merged(runs, tmp_path, "aligned", align_heads=20, **options)
    tokenizer = load_tokenizer(find_backbone(runs.backbone))
    for task in NAMES:
        data = load_task(TASKS[task], runs.data_dir)
        train = split_task(data, runs.seed, max_train=20).train
        encoded = tokenize(train, TASKS[task], tokenizer, runs.max_seq_len)
        path = directories(runs, "merged_model")[task]
        dense = AutoModelForSequenceClassification.from_pretrained(path)
        own = head_features(dense.eval(), encoded, tokenizer, len(train))
        for method in methods:
            before, after = (MergedUpdate(each / method, task).head for each in (plain, out))
            weight = next(name for name in before if name.endswith("weight"))
            features = head_features(load_merged(plain / method, task), encoded, tokenizer, 20)
            V, bias = before[weight].double(), weight.replace("weight", "bias")
            delta, constant = head_change(V, own, features, bias in before)
            torch.testing.assert_close(after[weight].double(), V + delta, atol=1e-4, rtol=1e-3)
            assert not torch.equal(after[weight], before[weight])
            for name in before.keys() - {weight, bias}:
                assert torch.equal(after[name], before[name])
            if bias in before:
                fitted = before[bias].double() + constant
                torch.testing.assert_close(after[bias].double(), fitted, atol=1e-4, rtol=1e-3)
    for method in methods:  # the updates are the same, and RegMean looks at five examples
        for file in (plain / method / "updates").iterdir():
            assert file.read_bytes() == (out / method / "updates" / file.name).read_bytes()


@of_one_family
def test_aligned_heads_are_scored_loaded_exported_and_repeated(runs, tmp_path):
    options = {"methods": ["task_arithmetic"], "export": ["adapter"]}
    out = merged(runs, tmp_path, align_heads=20, **options)
    row = json.loads((out / "results.json").read_text())["rows"][-1]
    assert json.loads((out / "results.json").read_text())["align_heads"] == 20
    base = AutoModelForSequenceClassification.from_pretrained(runs.backbone, num_labels=2)
    adapter = PeftModel.from_pretrained(base, out / "task_arithmetic" / "adapters" / "rte")
    data, tokenizer = validation(runs, "rte")
    model = load_merged(out / "task_arithmetic", "rte")
    logits, labels = predict(model, data, tokenizer, 8, title="")
    exported, _ = predict(adapter, data, tokenizer, 8, title="")
    assert row["scores"]["rte"] == pytest.approx((logits.argmax(-1) == labels).mean())
    assert abs(logits - exported).max() < 1e-4
    assert "fitted to the merge by 20 texts" in (out / "task_arithmetic" / "README.md").read_text()
    recipe = out / "task_arithmetic" / "recipe.json"
    again = MergeConfig(from_recipe=str(recipe), output_dir=str(tmp_path / "again"))
    merge_command.run(again)
    assert written(tmp_path / "again" / "task_arithmetic") == written(out / "task_arithmetic")
    with pytest.raises(UserError, match="--align-heads and --no-eval contradict each other"):
        merge_command.run(dataclasses.replace(again, no_eval=True))


def test_every_score_follows_from_the_predictions_that_stand_beside_it(runs, tmp_path):
    out = merged(runs, tmp_path, methods=["average", "emr"])
    table = pd.read_parquet(out / "predictions.parquet")
    for row in json.loads((out / "results.json").read_text())["rows"]:
        for task in NAMES:
            data, _ = validation(runs, task)
            part = table[(table.task == task) & (table.split == "")]
            assert part.example.tolist() == list(range(len(data)))
            assert part.label.tolist() == pytest.approx(data.datasets["labels"])
            kind = int if TASKS[task].labels else float
            predictions, references = (part[name].to_numpy(kind) for name in (row["name"], "label"))
            found = task_scores(TASKS[task], predictions, references)
            assert found[TASKS[task].score] == pytest.approx(row["scores"][task], abs=1e-6)


@others_in_sweeps
def test_the_model_is_scored_in_the_precision_that_is_asked_for(runs, tmp_path, monkeypatch):
    seen = set()

    def watching(model, *rest, **options):
        seen.add(model.dtype)
        return predict_splits(model, *rest, **options)

    monkeypatch.setattr(session, "predict_splits", watching)
    options = {"methods": ["average", "fisher", "regmean"], "diagnose": True}
    for dtype in ("float32", "bfloat16"):
        out = merged(runs, tmp_path, dtype, eval_dtype=dtype, **options)
        assert seen == {getattr(torch, dtype)}
        results = json.loads((out / "results.json").read_text())
        assert {each["dtype"] for each in results["evaluation"].values()} == {dtype}
        seen.clear()
    # What is stored does not depend on how it is scored, but for what looks at the model.
    one, two = (
        MergedUpdate(tmp_path / name / "average", "rte") for name in ("float32", "bfloat16")
    )
    assert all(torch.equal(one[module], two[module]) for module in one)


def test_one_task_alone_is_its_own_adapter_through_every_path(runs, tmp_path):
    """The same logits through PEFT, the merged path and the dense model."""
    paths = {"sst2": str(run_dir(runs, "sst2"))}
    out = merged(runs, tmp_path, methods=["average"], no_eval=True, paths=paths)
    data, tokenizer = validation(runs, "sst2")
    base = AutoModelForSequenceClassification.from_pretrained(runs.backbone, num_labels=2)
    base.config.pad_token_id = tokenizer.pad_token_id
    peft = PeftModel.from_pretrained(base, paths["sst2"])
    expected, _ = predict(peft, data, tokenizer, 8, title="")
    ours, _ = predict(load_merged(out / "average", "sst2"), data, tokenizer, 8, title="")
    assert abs(ours - expected).max() < 1e-5


def test_dense_checkpoints_merge_like_the_adapters_they_came_from(runs, tmp_path):
    """A mixture of both forms; what is stored dense is rounded to float32 once."""
    mixed = directories(runs) | {"rte": directories(runs, "merged_model")["rte"]}
    one = merged(runs, tmp_path, "one", no_eval=True, methods=["average"])
    two = merged(runs, tmp_path, "two", no_eval=True, methods=["average"], paths=mixed)
    states = [load_merged(out / "average", "rte").state_dict() for out in (one, two)]
    for name in states[0]:
        torch.testing.assert_close(states[0][name], states[1][name], rtol=1e-5, atol=1e-6)
    assert json.loads((two / "average" / "recipe.json").read_text())["backbone"] == runs.backbone


def test_merged_model_means_the_run_directory_where_no_dense_model_was_saved(runs, tmp_path):
    """The release's load_model_path.json names merged_model/, which is written on request."""
    renamed = []
    for path in map(Path, directories(runs, "merged_model").values()):
        path.rename(path.with_name("away"))
        renamed.append(path)
    try:
        paths = directories(runs, "merged_model")
        out = merged(runs, tmp_path, no_eval=True, methods=["average"], paths=paths)
    finally:
        for path in renamed:
            path.with_name("away").rename(path)
    recipe = json.loads((out / "average" / "recipe.json").read_text())
    assert {task: each["path"] for task, each in recipe["tasks"].items()} == {
        task: path.rstrip("/") for task, path in directories(runs).items()
    }


def test_the_recipe_says_what_went_in(runs, tmp_path):
    knobs = {"scale": 0.5, "density": 0.4}
    out = merged(runs, tmp_path, methods=["ties", "task_arithmetic"], no_eval=True, **knobs)
    recipes = {
        name: json.loads((out / name / "recipe.json").read_text())
        for name in ("ties", "task_arithmetic")
    }
    assert recipes["ties"]["knobs"] == knobs and recipes["task_arithmetic"]["knobs"] == {
        "scale": 0.5
    }
    checksums = {each["sha256"] for each in recipes["ties"]["tasks"].values()}
    assert len(checksums) == 3 and all(len(each) == 64 for each in checksums)
    assert "torch" in recipes["ties"]["environment"]


@of_one_family
def test_flags_override_the_runs_own_settings(runs, tmp_path):
    out = merged(runs, tmp_path, methods=["average"], max_test_samples=5)
    results = json.loads((out / "results.json").read_text())
    assert {each["max_test_samples"] for each in results["evaluation"].values()} == {5}
    assert {each["max_seq_len"] for each in results["evaluation"].values()} == {32}
    assert results["rows"][0]["metrics"]["rte"]["eval_samples"] == 5


@of_one_family
def test_a_search_scores_what_selected_the_runs_best_epoch(runs, tmp_path):
    """One task with λ = 1 is its own adapter: its held-out score stands in the run's metrics."""
    for task in NAMES:
        paths = {task: str(run_dir(runs, task))}
        options = {"methods": ["task_arithmetic"], "search": [1.0], "paths": paths}
        out = merged(runs, tmp_path, task, **options)
        found = json.loads((out / "results.json").read_text())["search"]["task_arithmetic"]
        metrics = json.loads((run_dir(runs, task) / "metrics.json").read_text())
        selected = metrics[f"selection_{TASKS[task].select}"]
        assert found["scores"][task] == [pytest.approx(selected, abs=1e-4)]


def test_weights_of_tasks_reach_the_methods_that_take_them(runs, tmp_path):
    methods = ["average", "dare_linear", "emr"]
    out = merged(runs, tmp_path, methods=methods, weights=[f"{NAMES[1]}=3"], no_eval=True)
    knobs = {
        name: json.loads((out / name / "recipe.json").read_text())["knobs"] for name in methods
    }
    assert knobs["average"]["weights"] == knobs["dare_linear"]["weights"] == [1, 3, 1]
    assert "weights" not in knobs["emr"]


def test_an_existing_output_stays_whole_until_a_new_one_is(runs, tmp_path, monkeypatch):
    out = merged(runs, tmp_path, methods=["average"], no_eval=True)
    with pytest.raises(UserError, match="--overwrite"):
        merged(runs, tmp_path, methods=["average"], no_eval=True)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def disk_full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("osrm.merged.save_file", disk_full)
    with pytest.raises(OSError, match="No space"):
        merged(runs, tmp_path, methods=["ties"], no_eval=True, overwrite=True)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert not list(tmp_path.glob(".out*"))


def test_any_peft_adapter_will_do(tiny, tmp_path):
    """Made by PEFT alone, without heads, for tasks that are not GLUE's."""
    paths = {}
    for i, task in enumerate(("polite", "brief")):
        torch.manual_seed(i)
        base = AutoModelForSequenceClassification.from_pretrained(tiny["roberta"])
        config = LoraConfig(r=2 + i, target_modules=["query"], use_rslora=True)
        model = get_peft_model(base, config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_()
        model.save_pretrained(tmp_path / task)
        paths[task] = str(tmp_path / task)
    out = merged(None, tmp_path, paths=paths, methods=["task_arithmetic"], scale=1.0, no_eval=True)
    recipe = json.loads((out / "task_arithmetic" / "recipe.json").read_text())
    assert recipe["backbone"] == str(tiny["roberta"])
    from osrm.merged import MergedUpdate

    update = MergedUpdate(out / "task_arithmetic", "brief")
    pairs = [read_adapter(Path(path)).updates for path in paths.values()]
    for name in update:
        expected = pairs[0][name].delta + pairs[1][name].delta
        torch.testing.assert_close(update[name], expected)
    with pytest.raises(UserError, match="merged from"):
        load_merged(out / "task_arithmetic", "rte")


@of_one_family
def test_the_report_joins_several_merges(runs, tmp_path, monkeypatch, capsys):
    first = merged(runs, tmp_path, "a", methods=["average"])
    other = json.loads((first / "results.json").read_text()) | {"init": "analytical"}
    second = Path(write(tmp_path / "results.json", other))
    arguments = [str(first / "results.json"), str(second), "--output-dir", str(tmp_path / "r")]
    monkeypatch.setattr("sys.argv", ["report", *arguments])
    report.main()
    text = (tmp_path / "r" / "table.md").read_text()
    assert text.strip() in capsys.readouterr().out
    starts = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("|")]
    assert [starts[0], *starts[2:]] == ["start", *["gaussian"] * 3, *["analytical"] * 3]
    assert (tmp_path / "r" / "plot.png").read_bytes().startswith(b"\x89PNG")
    other["tasks"] = {"rte": other["tasks"]["rte"]}
    write(second, other)
    with pytest.raises(UserError, match="other tasks"):
        report.main()


def test_bars_of_several_starts_are_named_by_the_knobs_that_they_share():
    one = Row("ties", {"density": 0.2, "scale": 1.0}, {}, 0.0, None, {})
    other = dataclasses.replace(one, knobs={"density": 0.2, "scale": 0.5})
    assert report.shared_title([one, one]) == "ties\n(density 0.2, scale 1)"
    assert report.shared_title([one, other]) == "ties\n(density 0.2)"
    assert report.shared_title([one, dataclasses.replace(one, knobs={})]) == "ties"


def test_defaults_come_from_the_shipped_files(monkeypatch):
    config = parse(MergeConfig, None, [])
    assert config.load_model_path == "load_model_path.json"
    assert [*json.loads(Path(config.hparams).read_text())] == [*METHODS]


@pytest.mark.parametrize(
    "weights, words",
    [
        (["rte=x"], ["'rte=x'", "TASK=X"]),
        (["rte"], ["'rte'", "TASK=X"]),
        (["rte=nan"], ["'rte=nan'"]),
        (["qnli=1", "stsb=2"], ["'qnli=1'", "'rte', 'sst2', 'stsb'"]),
        (["rte=1", "sst2=-1", "stsb=0"], ["sum to 0"]),
    ],
)
def test_weights_that_fit_no_task_are_refused(weights, words, runs, tmp_path):
    with pytest.raises(UserError) as caught:
        merged(runs, tmp_path, methods=["average"], weights=weights, no_eval=True)
    assert all(word in str(caught.value) for word in words), caught.value
    assert not (tmp_path / "out").exists()


def test_what_takes_no_weights_or_no_data_is_refused(runs, tmp_path):
    with pytest.raises(UserError, match="none of emr takes weights"):
        merged(runs, tmp_path, methods=["emr"], weights=["rte=2"], no_eval=True)
    with pytest.raises(UserError, match="regmean looks at data, which --no-eval leaves out"):
        merged(runs, tmp_path, methods=["regmean"], no_eval=True)


def test_a_base_with_a_head_of_another_size_is_trained_scored_merged_and_exported(
    tiny, tiny_data, tmp_path
):
    base = AutoModelForSequenceClassification.from_pretrained(tiny["roberta"], num_labels=3)
    base.save_pretrained(tmp_path / "base")
    load_tokenizer(find_backbone(str(tiny["roberta"]))).save_pretrained(tmp_path / "base")
    config = TrainConfig(
        **{"backbone": str(tmp_path / "base"), "data_dir": str(tiny_data), "epochs": 1, "rank": 2},
        **{"lr": 1e-2, "per_device_train_bsz": 16},
        **{"tasks": ["rte", "sst2"], "other_tasks": ["stsb"], "save_merged_model": True},
        output_dir=str(tmp_path / "runs"),
        init="analytical",
    )
    train(config)
    paths = {"rte": str(run_dir(config, "rte")), "sst2": str(run_dir(config, "sst2"))}
    paths["sst2"] += "/merged_model"
    options = {"methods": ["average"], "export": ["model"], "paths": paths}
    out = merged(config, tmp_path, **options) / "average"
    for task in paths:
        ours = load_merged(out, task)
        assert ours.config.num_labels == 2
        theirs = AutoModelForSequenceClassification.from_pretrained(out / "models" / task)
        for name, tensor in ours.state_dict().items():
            torch.testing.assert_close(theirs.state_dict()[name], tensor)
