"""The benchmark's own procedures are what it says they are, and both parts run."""

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from osrm.checkpoints import load_adapters
from osrm.features import batches_by_length
from osrm.merged import MergedUpdate


def script(name: str):
    path = Path(__file__).parents[1] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


benchmark, merging = script("starts"), script("merging")


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
