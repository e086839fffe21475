"""The benchmarks' own procedures are what they say they are, and their parts run."""

import copy
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Trainer

from osrm.adapters import WEIGHTS, save_adapter
from osrm.checkpoints import load_adapters
from osrm.features import FeatureFile, batches_by_length, starts, task_features
from osrm.merged import MergedUpdate
from osrm.moments import Moment

from .conftest import CONFIGS

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))  # as for a script there

import counting  # noqa: E402


def script(name: str):
    path = BENCHMARKS / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # for dataclasses
    spec.loader.exec_module(module)
    return module


benchmark, merging, planning = script("starts"), script("merging"), script("plan")
evaluation, training = script("evaluation"), script("training")


@pytest.mark.parametrize(
    "flags",
    [
        "roberta --layers 2 --width 64 --samples 3 --release-samples 2 --rank 4",
        "llama --layers 2 --width 64 --rank 4 --check",
    ],
)
def test_both_parts_run_and_their_energies_are_exact(flags, capsys):
    benchmark.main([*flags.split(), "--threads", "1"])
    printed = capsys.readouterr().out
    differences = re.findall(r"difference.*: (\d\.\de-\d+)", printed)
    assert len(differences) == 2 and all(float(each) < 1e-6 for each in differences)
    header, _, *rows = re.findall(r"^\|.*\|$", printed, re.MULTILINE)
    assert len(rows) == (4 if "roberta" in flags else 2)
    assert all(row.count("|") == header.count("|") for row in rows)
    assert "scaled" in printed


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

    data = benchmark.draw_examples(3, torch.Generator().manual_seed(0))
    names = ["layers.a", "layers.b"]
    means = {task: benchmark.release_means(Model(), names, data[task]) for task in data}
    ids = benchmark.padded(data["rte"], 128)["input_ids"].double().numpy()
    expected = np.sin(ids[..., None] * np.arange(16)).mean((0, 1))
    np.testing.assert_allclose(means["rte"]["layers.a"], expected, atol=1e-2)
    found = benchmark.release_starts(means, rank=4)
    for name in names:
        A = found["rte"][name]
        torch.testing.assert_close(A @ A.T, torch.eye(4), rtol=0, atol=1e-5)
        for task in data:
            if task != "rte":
                assert (A @ means[task][name]).abs().max() < 1e-5


def test_examples_have_the_lengths_of_the_table():
    data = benchmark.draw_examples(1000, torch.Generator().manual_seed(0))
    for task, mean in benchmark.TOKENS.items():
        lengths = [len(example) for example in data[task]]
        assert np.mean(lengths) == pytest.approx(mean, rel=0.06) and max(lengths) <= 128


def test_synthetic_moments_have_the_spectrum_they_say():
    """Up to the tasks' own factors and directions."""
    moments = benchmark.synthetic_moments(384, ["rte", "cola"], seed=0)
    for moment in moments.values():
        values = torch.linalg.eigvalsh(moment.data / moment.count)
        torch.testing.assert_close(moment.data, moment.data.T)
        ratios = values / benchmark.spectrum(384)
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
    merging.write_adapters("roberta", 1, 2, tmp_path)
    assert merging.ours("task_arithmetic", tmp_path, tmp_path / "ours") > 0
    assert merging.peft("cat", tmp_path, tmp_path / "peft", 1) > 0
    ours = MergedUpdate(tmp_path / "ours" / "task_arithmetic", "rte")
    theirs = load_adapters({"merged": tmp_path / "peft" / "merged"})
    assert [*ours] == [*theirs] == sorted(merging.shapes("roberta", 1))
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name][0], rtol=0, atol=5e-5)
        assert ours[name].abs().max() > 1e-3


def test_adapters_of_llama_have_its_shapes(tmp_path):
    merging.write_adapters("llama", 1, 2, tmp_path)
    updates = load_adapters({"rte": tmp_path / "rte"})
    assert {name: tuple(updates[name][0].shape) for name in updates} == merging.shapes("llama", 1)


# ------------------------------------------------- evaluation and training

FEW = "--models minilm --tasks stsb cola --grid 0.5 2 --examples 6 --repeats 1"


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

    monkeypatch.setattr("osrm.commands.scoring.applied", kept)
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
        for name, value in {"BATCH": 4, "EPOCHS": 1, "HELD_OUT": 8}.items():
            monkeypatch.setattr(training, name, value)
        found = training.measure(arm, "cola", "float32", 0, 64)
        assert found["examples_per_second"] > 0 and -1 <= found["score"] <= 1
        seen[arm] = shapes, sorted(rows)
    assert all(rows == seen["ours"][1] for _, rows in seen.values())
    assert [len(shapes) for shapes, _ in seen.values()] == [16, 16, 16]
    assert {width for _, width in seen["release"][0]} == {training.LENGTH}
    tokens = {arm: sum(a * b for a, b in shapes) for arm, (shapes, _) in seen.items()}
    assert tokens["ours"] < tokens["run_glue"] < tokens["release"]


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("training", lambda found: training.table(found["tasks"])),
        ("evaluation", lambda found: evaluation.table(found["cases"])),
    ],
)
def test_the_readme_has_the_numbers_of_the_results(name, rows):
    found = json.loads((BENCHMARKS / "results" / f"{name}.json").read_text())
    readme = (BENCHMARKS.parent / "README.md").read_text(encoding="utf-8")
    _, _, *lines = rows(found).splitlines()
    assert lines and all(line in readme for line in lines)


# ------------------------------------------------------------------- plan

TINY = {family: copy.deepcopy(CONFIGS[family]) for family in ("roberta", "llama")}
TINY["llama"].pad_token_id = 0
BATCH, LENGTH, RANK = 4, 32, 2


@contextmanager
def formula(autocast: bool):
    """Attention by torch's formula on any device, autocast as on a GPU."""
    with sdpa_kernel(SDPBackend.MATH), counting.OnGpu(autocast, kernels=False):
        yield


@contextmanager
def cpu_autocast():
    with sdpa_kernel(SDPBackend.MATH), torch.autocast("cpu", torch.bfloat16):
        yield


def tiny_model(family: str, dtype: torch.dtype, device: str):
    return counting.adapted(TINY[family], dtype, "qv", RANK, device)


def saved_for_backward(model, way) -> int:
    """Bytes of the tensors that autograd keeps, each storage once, parameters aside."""
    own = {each.untyped_storage()._cdata for each in counting.frozen(model)}
    own |= {each.untyped_storage()._cdata for each in counting.trained(model)}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            found[storage._cdata] = storage  # kept, so that no other takes its place
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda each: each), way():
        output = counting.logits(model, BATCH, LENGTH)
        labels = torch.zeros(BATCH, dtype=torch.long, device=output.device)
        F.cross_entropy(output, labels)
    return sum(each.nbytes() for each in found.values())


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("family", TINY)
def test_what_is_counted_without_data_is_what_there_is_with(family, autocast, checkpoint):
    dtype, way = (torch.bfloat16 if autocast else torch.float32), partial(formula, autocast)
    counts = [
        counting.count_step(tiny_model(family, dtype, device), BATCH, LENGTH, checkpoint, way)
        for device in ("meta", "cpu")
    ]
    planned, real = counts
    assert planned.operations == real.operations + 1  # whether there is padding is not looked at
    assert (planned.kept, planned.peak, planned.flops) == (real.kept, real.peak, real.flops)
    saved = saved_for_backward(tiny_model(family, dtype, "cpu"), way)
    if not checkpoint:
        assert real.kept == saved + 4  # the loss
    else:
        assert real.kept < saved / 2


@pytest.mark.parametrize("checkpoint", [False, True])
def test_autocast_as_planned_is_torchs_own(checkpoint):
    """Of Llama, which calls nothing that a CPU autocasts otherwise than a GPU does."""
    planned = counting.count_step(
        tiny_model("llama", torch.bfloat16, "meta"),
        BATCH,
        LENGTH,
        checkpoint,
        partial(formula, True),
    )
    real = counting.count_step(
        tiny_model("llama", torch.bfloat16, "cpu"), BATCH, LENGTH, checkpoint, cpu_autocast
    )
    assert (planned.kept, planned.peak, planned.flops) == (real.kept, real.peak, real.flops)


@pytest.mark.parametrize("family", TINY)
def test_attention_on_a_gpu_keeps_no_square_of_the_length(family):
    def kept(length: int, way) -> int:
        return counting.count_step(
            tiny_model(family, torch.bfloat16, "meta"), 8, length, False, way
        ).kept

    gpu, formulas = partial(counting.OnGpu, True), partial(formula, True)
    assert kept(64, gpu) < kept(64, formulas)
    # Only the mask, which has no heads, is quadratic.
    mask = 8 * 64 * 64 * 2 * TINY[family].num_hidden_layers
    assert kept(64, gpu) - 2 * kept(32, gpu) <= mask


def test_operations_by_hand():
    """A forward pass of Llama: two operations an entry of a weight and token, and attention."""
    config = TINY["llama"]
    model = counting.pretrained(config, torch.float32)
    count, inputs = counting.count_forward(
        model, BATCH, LENGTH, partial(counting.OnGpu, False), ["model.layers.0.self_attn.q_proj"]
    )
    weights = sum(
        each.weight.numel() for each in model.modules() if isinstance(each, torch.nn.Linear)
    )
    attention = config.num_hidden_layers * 2 * 2 * BATCH * LENGTH**2 * config.hidden_size
    assert count.flops == 2 * weights * BATCH * LENGTH + attention
    assert [tuple(each.shape) for each in inputs] == [(BATCH, LENGTH, config.hidden_size)]


def test_the_backbones_have_their_published_sizes():
    """In millions of parameters, without heads and the matrix that puts out Llama-3-8B's words."""
    published = {
        "minilm": 22.6,
        "roberta-large": 355,
        "t5-large": 738,
        "llama3.2-1b": 1236,
        "llama3.2-3b": 3213,
        "llama3-8b": 8030 - 4096 * 128256 / 1e6,
    }
    for name, config in counting.CONFIGS.items():
        body = counting.pretrained(config, torch.bfloat16).base_model
        numbers = sum(each.numel() for each in body.parameters()) / 1e6
        assert numbers == pytest.approx(published[name], rel=3e-3), name


def test_sizes_are_those_of_files_and_of_the_optimizer(tiny, tmp_path):
    for family, config in TINY.items():
        body = counting.pretrained(config, torch.float32).base_model
        stored = load_file(tiny[family] / "model.safetensors")
        stored = [each for name, each in stored.items() if "pooler" not in name]
        assert counting.size([*body.parameters()]) == counting.size(stored)
        planned = counting.trained(tiny_model(family, torch.float32, "meta"))
        model = tiny_model(family, torch.float32, "cpu")
        save_adapter(model, tmp_path)
        assert counting.size(planned) == counting.size([*load_file(tmp_path / WEIGHTS).values()])
        optimizer = torch.optim.AdamW(counting.trained(model))
        counting.logits(model, 2, 8).sum().backward()
        optimizer.step()
        states = [each for state in optimizer.state.values() for each in state.values()]
        assert counting.optimizer_size(planned) == counting.size(states)


@pytest.mark.parametrize("features", ["token", "sample", "mean"])
@pytest.mark.parametrize("samples", [8, 40])
def test_statistics_are_as_large_as_planned(features, samples, tmp_path):
    model = counting.pretrained(TINY["roberta"], torch.float32, "cpu")
    modules = [f"roberta.encoder.layer.{layer}.attention.self.query" for layer in (0, 1)]
    ids = torch.randint(4, 20, (samples, 16), generator=torch.Generator().manual_seed(0))
    batches = [
        {"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(8)
    ]
    settings = {"task": "none", "features": features, "count_padding": False}
    way = partial(formula, False)
    with sdpa_kernel(SDPBackend.MATH), counting.Meter() as meter:
        file = task_features(settings, model, modules, batches, tmp_path / "x.safetensors")
    vectors = {"token": ids.numel(), "sample": samples, "mean": 1}[features]
    d = model.config.hidden_size
    assert isinstance(file, FeatureFile)
    assert counting.size([*file.tensors.values()]) == 2 * counting.moment_size(vectors, d)
    meta = counting.pretrained(TINY["roberta"], torch.float32)
    forward, inputs = counting.count_forward(meta, 8, 16, way, modules)
    shapes = [tuple(each.shape) for each in inputs]
    most = counting.collecting_size(forward, shapes, features, samples, 4)
    assert 0.6 * most < meter.peak < 1.05 * most


def test_adding_rows_takes_what_is_planned():
    """Beside a forward pass, which hides it in small models."""
    batch, tokens, d = 8, 32, 64
    with counting.Meter() as meter:
        total = Moment.of(torch.randn(batch * tokens, d))
        waiting = [torch.randn(batch * tokens, d)]
        total = total + Moment.of(torch.cat(waiting))
    nothing = counting.Count(0, 0, 0, 0, 0)
    most = counting.collecting_size(nothing, [(batch, tokens, d)], "token", 2 * batch, 4)
    assert 0.6 * most < meter.peak < most


def test_solving_takes_what_is_planned():
    d, tasks, names = 256, 4, list("abcd")
    generator = torch.Generator().manual_seed(0)
    for vectors in (8, 2 * d):
        moments = {
            name: {"x": Moment.of(torch.randn(vectors, d, generator=generator))} for name in names
        }
        with counting.Meter() as meter:
            starts("analytical", names, {"x": d}, RANK, 0, moments, {"x": "x"}, names)
        own = tasks * counting.moment_size(vectors, d)
        planned = counting.solving_size(tasks, vectors, d) - own
        # Beside it there is the basis of the iteration, of a few columns of d numbers.
        assert planned * 0.9 < meter.peak < planned + 24 * 30 * d * 8


def test_a_merge_on_disk_is_as_large_as_planned(tmp_path):
    merging.write_adapters("roberta", 1, RANK, tmp_path)
    for method in ("task_arithmetic", "ties", "emr", "tsv"):
        merging.ours(method, tmp_path, tmp_path / method)
        files = (tmp_path / method / method / "updates").iterdir()
        stored = [each for path in files for each in load_file(path).values()]
        planned = counting.count_merge(method, {(1024, 1024): 2}, RANK, len(merging.TASKS))
        assert abs(counting.size(stored) - planned.disk) <= 8 * len(stored)  # the scaling


def test_a_plan_of_other_flags_is_printed_and_written(capsys, tmp_path):
    output = tmp_path / "folder" / "plan.json"
    flags = "--backbone minilm --gpus 2 --per-device-train-bsz 8 --block qkv --dtype float32"
    planning.main([*flags.split(), "--output", str(output), "--threads", "1"])
    printed = capsys.readouterr().out
    assert printed == planning.render({"minilm": json.loads(output.read_text())}) + "\n"
    for table in printed.split("\n\n"):
        assert len({line.count("|") for line in table.strip().splitlines()}) == 1


RESULTS = json.loads((BENCHMARKS / "results" / "plan.json").read_text())
CHECKS = json.loads((BENCHMARKS / "results" / "plan_check.json").read_text())
DOCUMENT = (BENCHMARKS / "README.md").read_text()


def test_the_document_has_the_numbers_of_the_results():
    assert DOCUMENT.endswith(planning.render_all(RESULTS, CHECKS))
    commands = re.findall(r"^python benchmarks/plan.py (.*)$", DOCUMENT, re.MULTILINE)
    assert len(commands) == 3 + len(planning.SETTINGS)
    for command in commands:
        planning.arguments().parse_args(shlex.split(command))


def same_versions():
    return planning.versions() == RESULTS["versions"]


counted = pytest.mark.skipif(not same_versions(), reason=f"counted with {RESULTS['versions']}")


@counted
@pytest.mark.parametrize("title", [each for each in planning.SETTINGS if "Llama" in each])
def test_the_results_are_what_is_computed(title):
    """All but merging, which takes a minute at Llama's size."""
    flags, committed = planning.SETTINGS[title], RESULTS["settings"][title]
    plan = planning.Plan(planning.arguments().parse_args(shlex.split(flags)))
    plan.merging = lambda: [planning.Row(**each) for each in committed["memory"]["merging"]]
    assert {"flags": flags, **plan.record()} == committed


@counted
def test_the_results_are_what_the_script_says(tmp_path):
    """In a process of its own: the checks of shapes that tests install take memory, too."""
    committed = RESULTS["settings"]["RoBERTa-large, 24 GB"]
    output = tmp_path / "plan.json"
    script = [sys.executable, str(BENCHMARKS / "plan.py"), *shlex.split(committed["flags"])]
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent)}
    script += ["--threads", "1", "--output", str(output)]
    subprocess.run(script, check=True, env=environment, capture_output=True)
    assert {"flags": committed["flags"], **json.loads(output.read_text())} == committed


@counted
@pytest.mark.parametrize("backbone", ["t5-large", "llama3.2-3b"])
def test_the_table_of_backbones_is_what_is_computed(backbone):
    plan = planning.Plan(planning.arguments().parse_args(["--backbone", backbone]))
    assert plan.overview() == RESULTS["backbones"][backbone]


def test_what_was_checked_is_as_planned():
    for each in CHECKS:
        off = abs(each["found"] - each["planned"])
        assert off <= (0.06 * each["planned"] if each["how"] == "resident memory" else 0), each
    if not same_versions():
        return
    config = counting.CONFIGS["minilm"]
    model = counting.adapted(config, torch.float32, "qv", 8)
    way = partial(counting.OnGpu, False, kernels=False)
    step = counting.count_step(model, 16, 128, False, way)
    assert [each["planned"] for each in CHECKS[:2]] == [step.kept, step.peak]
