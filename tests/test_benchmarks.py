"""The benchmarks' own procedures are what they say they are, and their parts run."""

import json
import re
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer

from osrm import embedded
from osrm.checkpoints import load_adapters
from osrm.data import batches_by_length
from osrm.merged import MergedUpdate

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))  # as for a script there

import common  # noqa: E402
import evaluation  # noqa: E402
import gpu  # noqa: E402
import memory  # noqa: E402
import merging  # noqa: E402
import starts  # noqa: E402
import training  # noqa: E402

# ------------------------------------------------------------------ starts


@pytest.mark.parametrize(
    "flags",
    [
        "roberta --layers 2 --width 64 --samples 3",
        "llama --layers 2 --width 64",
    ],
)
def test_both_parts_run(flags, capsys, tmp_path):
    output = tmp_path / "starts.json"
    starts.main([*flags.split(), "--threads", "1", "--output", str(output)])
    header, _, *rows = re.findall(r"^\|.*\|$", capsys.readouterr().out, re.MULTILINE)
    assert all(row.count("|") == header.count("|") for row in rows)
    result = json.loads(output.read_text())
    assert len(rows) == len(result["runs"]) == (4 if "roberta" in flags else 2)
    assert all(run["seconds"] > 0 and run["peak"] > 0 for run in result["runs"])
    assert result["flags"]["width"] == 64 and result["environment"]["torch"]


def test_the_release_averages_padding_too_and_its_start_avoids_the_means():
    torch.manual_seed(0)
    layers = torch.nn.ModuleDict({"a": torch.nn.Linear(16, 16), "b": torch.nn.Linear(16, 16)})

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = layers

        def forward(self, input_ids, attention_mask):
            hidden = torch.stack([torch.sin(input_ids * k) for k in range(16)], -1)
            return layers["b"](layers["a"](hidden))

    data = starts.draw_examples(3, torch.Generator().manual_seed(0))
    names = ["layers.a", "layers.b"]
    means = {task: starts.release_means(Model(), names, data[task]) for task in data}
    ids = starts.padded(data["rte"], 128)["input_ids"].double().numpy()
    expected = np.sin(ids[..., None] * np.arange(16)).mean((0, 1))
    np.testing.assert_allclose(means["rte"]["layers.a"], expected, atol=1e-2)
    found = starts.release_starts(means, rank=4)
    for name in names:
        A = found["rte"][name]
        torch.testing.assert_close(A @ A.T, torch.eye(4), rtol=0, atol=1e-5)
        for task in data:
            if task != "rte":
                assert (A @ means[task][name]).abs().max() < 1e-5


def test_examples_have_the_lengths_of_the_table():
    data = starts.draw_examples(1000, torch.Generator().manual_seed(0))
    for task, mean in starts.TOKENS.items():
        lengths = [len(example) for example in data[task]]
        assert np.mean(lengths) == pytest.approx(mean, rel=0.06) and max(lengths) <= 128


def test_synthetic_moments_have_the_spectrum_they_say():
    """Up to the tasks' own factors and directions."""
    moments = starts.synthetic_moments(384, ["rte", "cola"], seed=0)
    for moment in moments.values():
        values = torch.linalg.eigvalsh(moment.data / moment.count)
        torch.testing.assert_close(moment.data, moment.data.T)
        ratios = values / starts.spectrum(384)
        assert ratios.min() > 0.4 and ratios.max() < 2.5


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_batches_by_length(batch_size):
    lengths = torch.randint(1, 129, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    batches = batches_by_length(lengths, batch_size)
    assert sorted(index for batch in batches for index in batch) == list(range(200))
    for batch in batches:
        assert 1 <= len(batch) <= batch_size
        assert max(lengths[i] for i in batch) <= 1.3 * min(lengths[i] for i in batch)
    assert batches_by_length([], batch_size) == []


def test_what_is_timed_beside_peft_computes_the_same(tmp_path):
    """Task arithmetic with λ = 0.3 is PEFT's "cat", and both write it."""
    merging.write_adapters(merging.shapes("roberta", 1), 2, tmp_path)
    assert merging.ours("task_arithmetic", tmp_path, tmp_path / "ours") > 0
    assert merging.peft("cat", tmp_path, tmp_path / "peft", 1) > 0
    ours = MergedUpdate(tmp_path / "ours" / "task_arithmetic", "rte")
    theirs = load_adapters({"merged": tmp_path / "peft" / "merged"})
    assert [*ours] == [*theirs] == sorted(merging.shapes("roberta", 1))
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name][0], rtol=0, atol=5e-5)
        assert ours[name].abs().max() > 1e-3


def test_adapters_of_llama_have_its_shapes(tmp_path):
    merging.write_adapters(merging.shapes("llama", 1), 2, tmp_path)
    updates = load_adapters({"rte": tmp_path / "rte"})
    assert {name: tuple(updates[name][0].shape) for name in updates} == merging.shapes("llama", 1)


# ----------------------------------------------------- time and memory


def test_a_process_of_its_own_has_its_own_peak():
    """Nothing of what this process holds is in it."""
    held = torch.ones(2**28)
    peak, cost = common.in_new_process(1, common.resident, "VmHWM")
    assert 0.1 < peak <= cost.peak < 1 < common.resident("VmRSS") and cost.seconds > 0
    assert held.sum() > 0


def test_memory_grows_by_what_is_held():
    assert memory.growth(torch.zeros, 2**26) == pytest.approx(0.25, rel=0.02)


# ----------------------------------------------------------------- a GPU


@pytest.mark.parametrize("study", [False, pytest.param(True, marks=pytest.mark.sweep)])
def test_all_that_a_gpu_should_be_measured_with_runs(study, capsys, tmp_path, monkeypatch):
    """At toy sizes and on a CPU; a part that is finished is not run again."""
    counts = {"study": 3} if study else {"roberta": 6, "llama": 4, "merging": 4}
    flags = ["--quick", "--device", "cpu", "--repeats", "1", "--threads", "1", "--jobs", "2"]
    flags += ["--output", str(tmp_path), "--parts", *counts]
    gpu.main(flags)
    records = {part: json.loads((tmp_path / f"{part}.json").read_text()) for part in counts}
    for part, record in records.items():
        assert record["machine"] and record["environment"]["torch"]
        assert len(record["rows"]) == counts[part]
        for row in record["rows"]:
            assert all(value > 0 for value in row.values() if isinstance(value, float)), row
    if study:
        both = [row["averages"] for row in records["study"]["rows"] if "averages" in row]
        names = {"pre-trained", "individual", "task_arithmetic"}
        assert [row.keys() for row in both] == 2 * [names]
    printed = capsys.readouterr().out
    assert printed.count("\n| ") == 2 * len(counts) + sum(counts.values())

    def never(_):
        raise AssertionError("it is finished")

    monkeypatch.setattr(gpu, "PARTS", dict.fromkeys(gpu.PARTS, never))
    gpu.main(flags)
    rows = re.findall(r"^\| .*$", printed, re.MULTILINE)
    assert re.findall(r"^\| .*$", capsys.readouterr().out, re.MULTILINE) == rows


def test_what_travels_is_a_cache_of_the_model_in_bfloat16(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.subprocess, "run", lambda *_, **__: (tmp_path / "wheels").mkdir())
    sizes = dict(gpu.pack(tmp_path))
    assert sizes.keys() == {tmp_path / "cache", tmp_path / "wheels"}
    assert 40 * 2**20 < sizes[tmp_path / "cache"] < 57 * 2**20
    original = load_file(embedded.minilm() / "model.safetensors")
    data = sorted(path.name for path in embedded.mini_glue().iterdir())
    monkeypatch.setenv("OSRM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("osrm.embedded.archives.fetch", None)
    packed = load_file(embedded.minilm() / "model.safetensors")
    assert packed.keys() == original.keys()
    assert all(torch.equal(packed[name], original[name].bfloat16()) for name in original)
    assert sorted(path.name for path in embedded.mini_glue().iterdir()) == data


# ------------------------------------------------- evaluation and training

FEW = "--models minilm --tasks stsb cola --grid 0.5 2 --examples 6 --repeats 1 --threads 1"


def test_lending_and_reloading_are_compared_on_equal_scores(capsys, tmp_path):
    evaluation.main([*FEW.split(), "--output", str(tmp_path / "found.json")])
    (case,) = json.loads((tmp_path / "found.json").read_text())["cases"]
    (place,), (loaded,) = case["seconds"].values()
    assert 0 < place["predictions"] < place["all"] and 0 < loaded["predictions"] < loaded["all"]
    assert capsys.readouterr().out.count("| minilm | 2 × 2 | 6 |") == 1


def test_an_update_that_stays_in_the_model_stops_the_benchmark(monkeypatch):
    @contextmanager
    def kept(model, update, memory):
        for name in update:
            evaluation.linear_weight(model, name).data += update[name]
        yield

    monkeypatch.setattr("osrm.commands.merger.applied", kept)
    with pytest.raises(SystemExit, match="is not as it was"):
        evaluation.main(FEW.split())


def test_the_arms_of_training_differ_in_padding_and_order_alone(monkeypatch):
    """Each takes as many steps, of the same examples; the release's are all padded to the end."""
    seen, step = {}, Trainer.training_step
    for arm in training.ARMS:
        shapes, rows = [], []

        def noted(self, model, inputs, *rest, shapes=shapes, rows=rows):
            shapes.append(tuple(inputs["input_ids"].shape))
            for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
                rows.append(tuple(ids[mask.bool()].tolist()))
            return step(self, model, inputs, *rest)

        monkeypatch.setattr(Trainer, "training_step", noted)
        for name, value in {"BATCH": 4, "EPOCHS": 1, "HELD_OUT": 8, "LENGTH": 48}.items():
            monkeypatch.setattr(training, name, value)
        found = training.measure(arm, "cola", "float32", 0, 32)
        assert found["examples_per_second"] > 0 and -1 <= found["score"] <= 1
        seen[arm] = shapes, sorted(rows)
    assert all(rows == seen["ours"][1] for _, rows in seen.values())
    assert [len(shapes) for shapes, _ in seen.values()] == [8, 8, 8]
    assert {width for _, width in seen["release"][0]} == {training.LENGTH}
    tokens = {arm: sum(a * b for a, b in shapes) for arm, (shapes, _) in seen.items()}
    assert tokens["ours"] < tokens["run_glue"] < tokens["release"]


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("training", lambda found: training.rows(found["tasks"])),
        ("evaluation", lambda found: evaluation.rows(found["cases"])),
    ],
)
def test_the_manual_has_the_numbers_of_the_results(name, rows):
    found = json.loads((BENCHMARKS / "results" / f"{name}.json").read_text())
    manual = (BENCHMARKS.parent / "docs/speed.md").read_text(encoding="utf-8")
    _, _, *lines = rows(found).splitlines()
    assert lines and all(line in manual for line in lines)
