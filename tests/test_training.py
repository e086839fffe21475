"""Training: what the release broke in silence, each shown broken in the release's way too."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from osrm.adapters import add_lora, read_adapter
from osrm.backbones import find_backbone, load_model, load_tokenizer, projections
from osrm.commands.train import train
from osrm.data import tokenize
from osrm.evaluation import predict
from osrm.glue import TASKS
from osrm.runs import run_dir
from osrm.training import enable_checkpointing
from tests.conftest import make_examples, small, updates_and_head, write_data

FAMILIES = ["roberta", "t5", "llama"]
LABELS = TASKS["rte"].labels


def with_lora(directory):
    backbone = find_backbone(str(directory))
    tokenizer = load_tokenizer(backbone)
    model = load_model(backbone, LABELS, tokenizer, torch.float32)
    return add_lora(model, projections(model, "qv", 2), 2, 4), tokenizer


def gradients(model, tokenizer):
    """{name: has a gradient} of every adapter factor, B not at zero so that A gets one too."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    batch = tokenizer(["a good dog runs", "the cat sleeps"], padding=True, return_tensors="pt")
    model.train()
    model(**batch, labels=torch.tensor([0, 1])).loss.backward()
    return {
        name: parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_trains_every_factor(tiny, family):
    """Detail 6."""
    model, tokenizer = with_lora(tiny[family])
    enable_checkpointing(model)
    assert model.get_base_model().is_gradient_checkpointing
    found = gradients(model, tokenizer)
    assert found and all(found.values())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_releases_checkpointing_trains_none(tiny, family):
    model, tokenizer = with_lora(tiny[family])
    base = model.get_base_model()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    base.disable_input_require_grads() if hasattr(base, "_require_grads_hook") else None
    assert not any(gradients(model, tokenizer).values())


def test_a_models_own_padding_token_stays(tiny):
    """Detail 8: positions of RoBERTa are counted from its padding id."""
    tokenizer = load_tokenizer(find_backbone(str(tiny["roberta"])))
    assert tokenizer.pad_token == "<pad>"
    llama = find_backbone(str(tiny["llama"]))
    assert AutoTokenizer.from_pretrained(llama.path).pad_token is None
    assert load_tokenizer(llama).pad_token == "</s>"
    model = load_model(llama, LABELS, load_tokenizer(llama), torch.float32)
    assert model.config.pad_token_id == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_leaves_everything_that_it_should(tiny, tiny_data, tmp_path, family):
    """Details 6, 7, 9: every factor and head is trained, and saved; with gradient checkpointing."""
    options = {"init": "analytical", "save_merged_model": True, "gradient_checkpoint": True}
    config = small(tiny, tiny_data, tmp_path, family, **options)
    train(config)
    for task in ("rte", "sst2"):
        directory = run_dir(config, task)
        assert {path.name for path in directory.iterdir()} == {
            *("adapter_config.json", "adapter_model.safetensors", "init_model", "merged_model"),
            *("args.json", "metrics.json", "trainer_state.json", "README.md"),
        }
        before, head_before = updates_and_head(directory / "init_model")
        after, head_after = updates_and_head(directory)
        for name, pair in after.items():
            assert not before[name].B.any() and pair.B.any()
            assert not torch.equal(before[name].A, pair.A)
        assert all(not torch.equal(head_after[name], head_before[name]) for name in head_after)

        labels = {"num_labels": 2}
        base = AutoModelForSequenceClassification.from_pretrained(tiny[family], **labels)
        dense = AutoModelForSequenceClassification.from_pretrained(directory / "merged_model")
        peft = PeftModel.from_pretrained(base, directory)
        tokenizer = load_tokenizer(find_backbone(str(tiny[family])))
        data = tokenize(pd.DataFrame(make_examples(task, 9, seed=5)), TASKS[task], tokenizer, 32)
        base.config.pad_token_id = dense.config.pad_token_id
        through_peft, _ = predict(peft, data, tokenizer, 4, title="peft")
        through_dense, _ = predict(dense, data, tokenizer, 4, title="dense")
        np.testing.assert_allclose(through_peft, through_dense, rtol=1e-4, atol=1e-5)


def test_orthonormal_start_and_a_seed_for_each_task(tiny, tiny_data, tmp_path):
    """Detail 13: one seed gave all two-label tasks the same gaussian A, byte for byte."""
    gaussian = small(tiny, tiny_data, tmp_path, init="gaussian", epochs=1)
    analytical = small(tiny, tiny_data, tmp_path, init="analytical", epochs=1)
    train(gaussian)
    train(analytical)
    starts = {
        (config.init, task): read_adapter(run_dir(config, task) / "init_model")
        for config in (gaussian, analytical)
        for task in ("rte", "sst2")
    }
    first = next(iter(starts["gaussian", "rte"].updates))
    A = {key: adapter.updates[first].A for key, adapter in starts.items()}
    assert not torch.equal(A["gaussian", "rte"], A["gaussian", "sst2"])
    torch.testing.assert_close(A["analytical", "rte"] @ A["analytical", "rte"].T, torch.eye(2))
    heads = {key: adapter.head["classifier.dense.weight"] for key, adapter in starts.items()}
    assert not torch.equal(heads["gaussian", "rte"], heads["gaussian", "sst2"])
    # The two arms of a comparison differ in A alone.
    assert torch.equal(heads["gaussian", "rte"], heads["analytical", "rte"])


def test_only_osrm_looks_at_features(tiny, tiny_data, tmp_path, monkeypatch):
    """Detail 16."""
    monkeypatch.setattr("osrm.bank.collect", lambda *_: pytest.fail("features"))
    train(small(tiny, tiny_data, tmp_path, init="gaussian", epochs=1, tasks=["rte"]))


def test_args_and_metrics(tiny, tiny_data, tmp_path):
    config = small(
        tiny, tiny_data, tmp_path, tasks=["stsb"], max_test_samples=20, init="analytical"
    )
    train(config)
    directory = run_dir(config, "stsb")
    args = json.loads((directory / "args.json").read_text())
    assert args["task"] == "stsb" and args["lr"] == 1e-2 and args["other_tasks"] == ["rte", "sst2"]
    assert {"torch", "peft", "transformers", "git_commit"} <= args["environment"].keys()
    assert args["data"]["train"]["examples"] == 54 and args["data"]["selection"]["examples"] == 6
    assert len({split["fingerprint"] for split in args["data"].values()}) == 3
    metrics = json.loads((directory / "metrics.json").read_text())
    names = {"eval_pearson", "eval_spearmanr", "eval_combined_score", "eval_samples"}
    assert names <= metrics.keys() and metrics["eval_samples"] == 20
    assert all(math.isfinite(value) for value in metrics.values())
    state = json.loads((directory / "trainer_state.json").read_text())
    scores = [log["eval_combined_score"] for log in state["log_history"] if "eval_loss" in log]
    assert len(scores) == 2 and metrics["selection_combined_score"] == max(scores)


def test_a_finished_task_is_not_trained_again(tiny, tiny_data, tmp_path):
    config = small(tiny, tiny_data, tmp_path, tasks=["rte"], epochs=1)
    train(config)
    adapter = run_dir(config, "rte") / "adapter_model.safetensors"
    before = adapter.stat().st_mtime_ns
    (paths,) = tmp_path.glob("load_model_path-*.json")
    assert [*json.loads(paths.read_text())] == ["rte"]
    train(small(tiny, tiny_data, tmp_path, tasks=["sst2"], epochs=1))  # elsewhere, say
    assert [*json.loads(paths.read_text())] == ["rte", "sst2"]
    (run_dir(config, "sst2") / "metrics.json").unlink()
    train(small(tiny, tiny_data, tmp_path, epochs=1, resume=True))
    assert adapter.stat().st_mtime_ns == before
    assert (run_dir(config, "sst2") / "metrics.json").exists()


def test_the_task_is_learnt(tiny, tmp_path):
    """The label of the tiny tasks is whether a word occurs: chance is not enough."""
    write_data(tmp_path / "data", ["sst2", "rte"], train=600, validation=100)
    config = small(
        tiny, tmp_path / "data", tmp_path, tasks=["sst2"], init="analytical", epochs=8, lr=2e-2
    )
    train(config)
    metrics = json.loads((run_dir(config, "sst2") / "metrics.json").read_text())
    assert metrics["eval_accuracy"] > 0.95


@pytest.mark.parametrize("freeze", ["A", "B"])
def test_freezing_holds_through_a_run(tiny, tiny_data, tmp_path, freeze):
    config = small(tiny, tiny_data, tmp_path, tasks=["rte"], epochs=1, freeze=freeze)
    train(config)
    before = read_adapter(run_dir(config, "rte") / "init_model").updates
    after = read_adapter(run_dir(config, "rte")).updates
    for name in after:
        assert torch.equal(getattr(before[name], freeze), getattr(after[name], freeze))


def test_bfloat16_trains_on_the_cpu_too(tiny, tiny_data, tmp_path):
    """Detail 15: what is saved is float32, and dense is the float32 base plus the update."""
    config = small(
        *(tiny, tiny_data, tmp_path),
        **{"tasks": ["rte"], "epochs": 1, "dtype": "bfloat16", "save_merged_model": True},
    )
    train(config)
    pairs, head = updates_and_head(run_dir(config, "rte"))
    dense = AutoModelForSequenceClassification.from_pretrained(
        run_dir(config, "rte") / "merged_model"
    )
    base = AutoModelForSequenceClassification.from_pretrained(tiny["roberta"]).base_model
    merged = dense.base_model.state_dict()
    for name, tensor in base.state_dict().items():
        pair = pairs.get(f"roberta.{name.removesuffix('.weight')}")
        torch.testing.assert_close(merged[name], tensor + pair.delta if pair else tensor)
    assert all(pair.B.any() and pair.B.dtype == torch.float32 for pair in pairs.values())
    assert all(tensor.isfinite().all() for tensor in head.values())


def test_epochs_and_rates_of_each_task_come_from_their_files(tiny, tiny_data, tmp_path):
    """Detail 1: with these files and without them the release stopped with a NameError."""
    (tmp_path / "epochs.json").write_text(json.dumps({"rte": 1, "sst2": 2, "cola": 9}))
    (tmp_path / "lrs.json").write_text(json.dumps({"rte": 1e-3, "sst2": 2e-3}))
    files = {"load_epochs": str(tmp_path / "epochs.json"), "load_lrs": str(tmp_path / "lrs.json")}
    config = small(tiny, tiny_data, tmp_path, **files)
    train(config)
    for task, epochs, lr in (("rte", 1, 1e-3), ("sst2", 2, 2e-3)):
        state = json.loads((run_dir(config, task) / "trainer_state.json").read_text())
        assert state["epoch"] == epochs
        rates = [log["learning_rate"] for log in state["log_history"] if "learning_rate" in log]
        assert 0 < max(rates) <= lr
        args = json.loads((run_dir(config, task) / "args.json").read_text())
        assert (args["epochs"], args["lr"]) == (epochs, lr)


@pytest.mark.parametrize("features", ["token", "sample", "mean"])
def test_one_example_is_enough_for_features(tiny, tiny_data, tmp_path, features):
    """Detail 5: the release divided by n - 1."""
    config = small(
        tiny, tiny_data, tmp_path, init="analytical", max_num_samples=1, features=features, epochs=1
    )
    train(config)
    pairs = read_adapter(run_dir(config, "rte") / "init_model").updates
    for pair in pairs.values():
        torch.testing.assert_close(pair.A @ pair.A.T, torch.eye(2))


def test_matched_and_mismatched_scores_stand_side_by_side(tiny, tmp_path):
    """Detail 14: the release's mismatched scores replaced the matched ones."""
    splits = {"train": 40, "validation_matched": 20, "validation_mismatched": 10}
    config = small(
        tiny, write_data(tmp_path / "data", ["mnli"], **splits), tmp_path, tasks=["mnli"]
    )
    train(config)
    metrics = json.loads((run_dir(config, "mnli") / "metrics.json").read_text())
    assert (metrics["eval_samples"], metrics["eval_samples_mm"]) == (20, 10)
    assert {"eval_accuracy", "eval_accuracy_mm"} <= metrics.keys()


def test_the_releases_way_of_selecting_is_there_when_asked_for(tiny, tiny_data, tmp_path):
    config = small(tiny, tiny_data, tmp_path, tasks=["rte"], select_on="validation")
    train(config)
    metrics = json.loads((run_dir(config, "rte") / "metrics.json").read_text())
    assert metrics["train_samples"] == 60
    assert metrics["selection_accuracy"] == pytest.approx(metrics["eval_accuracy"], abs=1e-6)
