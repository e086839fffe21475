"""Every method against its oracle, and the theorems that hold whatever the numbers are."""

import json
import math
import subprocess
import sys
import weakref
from collections.abc import Mapping
from itertools import pairwise, permutations
from pathlib import Path

import numpy as np
import pytest
import torch

from osrm.errors import UserError
from osrm.merging import METHODS, LazyUpdates, Method, check_knobs, merge
from osrm.merging.ties import trim_threshold
from tests import oracles

ROOT = Path(__file__).parent.parent

CASES = [
    ("average", {}),
    ("task_arithmetic", {"scale": 0.3}),
    ("task_arithmetic", {"scale": -1}),
    ("ties", {"density": 0.2, "scale": 1.0}),
    ("ties", {"density": 0.9, "scale": 0.7}),
    ("ties", {"density": 1, "scale": 1.0}),
    ("ties", {"density": 1e-6, "scale": 1.0}),
    ("emr", {}),
]
KEEPS_EQUAL_UPDATES = [
    ("average", {}, 1.0),
    ("task_arithmetic", {"scale": 0.25}, 0.25),
    ("ties", {"density": 1.0, "scale": 0.7}, 0.7),
    ("emr", {}, 1.0),
]
"""method, knobs, and what T equal updates are multiplied by (task arithmetic: times T)"""
SHAPES = {"layer.1.query": (5, 7), "layer.0.value": (3, 11), "head": (1, 1), "tall": (19, 2)}


def gaussian(tasks=4, seed=0, shapes=SHAPES):
    rng = torch.Generator().manual_seed(seed)
    return {name: torch.randn(tasks, *shape, generator=rng) for name, shape in shapes.items()}


def tied(tasks=4, seed=0):
    """Few different values: equal magnitudes at every threshold, exact cancellation, zeros."""
    rng = torch.Generator().manual_seed(seed)
    return {
        name: torch.randint(-3, 4, (tasks, *shape), generator=rng) / 4
        for name, shape in SHAPES.items()
    }


def with_silent_task(tasks=4, seed=0):
    updates = gaussian(tasks, seed)
    for deltas in updates.values():
        deltas[-1] = 0
    return updates


def uneven(tasks=4, seed=0):
    """Modules and tasks of very different norm."""
    norms = torch.logspace(-3, 3, tasks)[:, None, None]
    return {
        name: deltas * norms * 10.0**i
        for i, (name, deltas) in enumerate(gaussian(tasks, seed).items())
    }


MAKERS = [gaussian, tied, with_silent_task, uneven]


def assert_equal(merged, expected, **tolerance):
    assert list(merged) == list(expected)
    for name in expected:
        torch.testing.assert_close(merged[name], torch.as_tensor(expected[name]), **tolerance)


def test_every_method_is_tested_and_configured():
    shipped = json.loads((ROOT / "hparams" / "merge.json").read_text())
    assert {name for name, _ in CASES} == set(METHODS) == set(shipped)
    for name, knobs in shipped.items():
        check_knobs(name, knobs)
        merge(name, gaussian(), **knobs)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("tasks", [1, 2, 3, 8])
@pytest.mark.parametrize("name, knobs", CASES)
def test_method_equals_its_oracle(name, knobs, tasks, make):
    for seed in range(3):
        updates = make(tasks, seed)
        oracle = getattr(oracles, name)
        expected = oracle({module: deltas.numpy() for module, deltas in updates.items()}, **knobs)
        merged = merge(name, updates, **knobs)
        for module in updates:
            assert merged[module].dtype == torch.float32
        assert_equal(merged, expected, check_dtype=False, rtol=2e-5, atol=1e-6)


def test_ties_zero_sums_follow_the_majority_of_all_modules():
    cancelling = torch.tensor([[[2.0]], [[-2.0]]])
    others = torch.full((2, 1, 3), -1.0)
    merged = merge("ties", {"here": cancelling, "there": others}, density=1.0)
    assert merged["here"].flatten().tolist() == [-2, -2]
    balanced = torch.tensor([[[1.0, -1.0]], [[1.0, -1.0]]])
    merged = merge("ties", {"here": cancelling, "there": balanced}, density=1.0)
    assert merged["here"].flatten().tolist() == [0, 0]


@pytest.mark.parametrize("name", ["ties", "emr"])
def test_election_is_exact_whatever_the_order_of_tasks(name):
    knobs = {"density": 1.0} if name == "ties" else {}
    negative = torch.full((3, 1, 2), -1.0)
    for order in permutations([1.0, 2.0**-30, -1.0]):
        close_race = torch.tensor(order)[:, None, None]
        merged = merge(name, {"close": close_race, "rest": negative}, **knobs)["close"]
        assert merged.amax() > 0 and merged.amin() >= 0


def test_ties_threshold_is_one_for_all_modules():
    updates = {"large": torch.full((1, 2, 2), 5.0), "small": torch.full((1, 4, 4), 0.1)}
    merged = merge("ties", updates, density=0.15)
    assert merged["large"].eq(5).all() and merged["small"].eq(0).all()


def test_emr_gives_each_task_its_own_mean_magnitude_back():
    updates = uneven()
    merged = merge("emr", updates)
    for row in range(4):
        own = sum(updates[name][row].abs().mean() for name in updates)
        received = sum(merged[name][row].abs().mean() for name in updates)
        torch.testing.assert_close(received, own)


def test_emr_task_that_agrees_nowhere_receives_zero():
    updates = {"w": torch.tensor([[[3.0, -3.0]], [[-1.0, 1.0]]])}
    assert merge("emr", updates)["w"].tolist() == [[[3, -3]], [[0, 0]]]


@pytest.mark.parametrize("name, knobs, factor", KEEPS_EQUAL_UPDATES)
@pytest.mark.parametrize("tasks", [1, 2, 3, 8])
def test_equal_updates_merge_to_themselves(name, knobs, factor, tasks):
    one = gaussian(tasks=1)
    updates = {module: delta.expand(tasks, -1, -1) for module, delta in one.items()}
    times = factor * tasks if name == "task_arithmetic" else factor
    expected = {module: times * deltas for module, deltas in updates.items()}
    assert_equal(merge(name, updates, **knobs), expected)


@pytest.mark.parametrize("name, knobs", CASES)
class TestTheorems:
    @pytest.mark.parametrize("make", MAKERS)
    def test_permuting_tasks_permutes_rows(self, name, knobs, make):
        updates = make()
        order = [2, 0, 3, 1]
        permuted = {module: deltas[order] for module, deltas in updates.items()}
        merged = merge(name, updates, **knobs)
        expected = {module: merged[module][order] for module in updates}
        assert_equal(merge(name, permuted, **knobs), expected, rtol=2e-5, atol=1e-6)

    def test_zero_stays_zero(self, name, knobs):
        zero = {module: torch.zeros(3, *shape) for module, shape in SHAPES.items()}
        assert_equal(merge(name, zero, **knobs), zero, rtol=0, atol=0)

    def test_doubling_the_updates_doubles_the_merged(self, name, knobs):
        updates = gaussian()
        doubled = {module: 2 * deltas for module, deltas in updates.items()}
        merged = merge(name, updates, **knobs)
        expected = {module: 2 * merged[module] for module in updates}
        assert_equal(merge(name, doubled, **knobs), expected, rtol=0, atol=0)

    @pytest.mark.parametrize("make", MAKERS)
    def test_order_of_modules_does_not_matter(self, name, knobs, make):
        updates = make()
        turned = dict(reversed(updates.items()))
        merged = merge(name, turned, **knobs)
        assert list(merged) == list(turned)
        for module in updates:
            torch.testing.assert_close(merged[module], merge(name, updates, **knobs)[module])

    @pytest.mark.parametrize("make", MAKERS)
    def test_lazy_input_gives_the_same(self, name, knobs, make):
        updates = make()
        lazy = LazyUpdates(updates, lambda module: updates[module].clone())
        assert_equal(merge(name, lazy, **knobs), merge(name, updates, **knobs), rtol=0, atol=0)

    def test_inputs_are_neither_changed_nor_aliased(self, name, knobs):
        for tasks in (1, 3):
            updates = gaussian(tasks)
            before = {module: deltas.clone() for module, deltas in updates.items()}
            merged = merge(name, updates, **knobs)
            for module, deltas in updates.items():
                storage = merged[module].untyped_storage()
                assert storage.data_ptr() != deltas.untyped_storage().data_ptr()
            assert_equal(updates, before, rtol=0, atol=0)

    def test_shared_updates_are_views(self, name, knobs):
        merged = merge(name, gaussian(), **knobs)["tall"]
        assert merged.shape == (4, 19, 2)
        assert name == "emr" or merged.stride(0) == 0

    def test_half_precision_is_computed_in_float32(self, name, knobs):
        half = {module: deltas.bfloat16() for module, deltas in gaussian().items()}
        full = {module: deltas.float() for module, deltas in half.items()}
        assert_equal(merge(name, half, **knobs), merge(name, full, **knobs), rtol=0, atol=0)

    def test_one_modules_stack_is_alive_at_a_time(self, name, knobs):
        updates = Watched(gaussian())
        merged = merge(name, updates, **knobs)
        for module in merged:
            merged[module].sum()
        assert updates.most_alive == 1
        assert updates.alive() == 0


class Watched(Mapping):
    """Updates whose every look-up makes a stack anew; counts the stacks whose memory is held.

    A tensor made by `from_numpy` keeps its array alive as long as any view of it exists.
    """

    def __init__(self, updates):
        self.updates = updates
        self.references = []
        self.most_alive = 0

    def alive(self):
        return sum(reference() is not None for reference in self.references)

    def __getitem__(self, name):
        array = self.updates[name].numpy().copy()
        self.references.append(weakref.ref(array))
        self.most_alive = max(self.most_alive, self.alive())
        return torch.from_numpy(array)

    def __iter__(self):
        return iter(self.updates)

    def __len__(self):
        return len(self.updates)


def test_watched_sees_a_hoarder():
    updates = Watched(gaussian())
    views = [updates[name][0, 0] for name in updates]
    assert updates.most_alive == updates.alive() == len(views)


def by_sorting(vectors, density):
    """The threshold that the published code takes, from all entries of a task at once."""
    k = int(vectors.shape[1] * (1 - density))
    return vectors.abs().kthvalue(k, dim=1).values if k else torch.zeros(len(vectors))


def entries(kind, tasks, size, rng):
    gaussian = torch.randn(tasks, size, generator=rng)
    return {
        "gaussian": gaussian,
        "heavy ties": (gaussian * 2).round() / 2,
        "one value": torch.full((tasks, size), -0.1),
        "denormal": gaussian * 1e-42,
        "huge": gaussian * 1e37,
        "every exponent": gaussian.sign() * 10.0 ** (gaussian * 12).clamp(-44, 38),
        "nearly equal": 1 + gaussian * 1e-6,
        "zeros": torch.zeros(tasks, size),
        "signed zeros": torch.where(gaussian > 0, 0.0, -0.0),
    }[kind]


@pytest.mark.parametrize("size", [1, 2, 3, 10, 101, 5000])
@pytest.mark.parametrize(
    "kind",
    [
        "gaussian",
        "heavy ties",
        "one value",
        "denormal",
        "huge",
        "every exponent",
        "nearly equal",
        "zeros",
        "signed zeros",
    ],
)
def test_streamed_threshold_is_the_kth_value(kind, size):
    rng = torch.Generator().manual_seed(size)
    vectors = entries(kind, 3, size, rng)
    cuts = sorted({0, size // 3, size // 2, size})
    updates = {f"module {start}": vectors[:, None, start:end] for start, end in pairwise(cuts)}
    densities = [1.0, 0.9, 0.5, 0.2, 0.1, 1 / size, 1e-9, *torch.rand(10, generator=rng).tolist()]
    for density in densities:
        threshold = trim_threshold(updates, density)
        torch.testing.assert_close(threshold, by_sorting(vectors, density), rtol=0, atol=0)


def test_the_number_of_trimmed_entries_is_cut_off_literally():
    updates = {"w": torch.arange(1.0, 11.0).reshape(1, 2, 5)}
    assert 10 * (1 - 0.9) < 1
    assert trim_threshold(updates, 0.9).tolist() == [0]
    assert trim_threshold(updates, 0.2).tolist() == [8]


def refused(name, knobs):
    with pytest.raises(UserError) as caught:
        merge(name, NothingToRead(), **knobs)
    message = str(caught.value)
    assert "\n" not in message
    return message


class NothingToRead(dict):
    def __iter__(self):
        raise AssertionError("work began before the settings were checked")

    __getitem__ = keys = values = items = __iter__


def test_unknown_method_is_refused_with_those_known():
    assert refused("tiess", {}) == (
        "unknown merging method 'tiess': choose one of average, task_arithmetic, ties, emr"
    )


def test_every_problem_with_knobs_is_named_in_one_line():
    assert refused("ties", {"densty": 0.2, "density": 0, "scale": math.nan}) == (
        "merging method 'ties': unknown knob 'densty' (known: density, scale); "
        "density must be a number in (0, 1], not 0; scale must be a finite number, not nan"
    )
    assert "unknown knob 'scale' (known: none)" in refused("average", {"scale": 1.0})


@pytest.mark.parametrize("density", [0, -0.1, 1.0001, math.nan, math.inf, "0.2", None, True, [0.2]])
def test_density_outside_its_range_is_refused(density):
    assert "density must be" in refused("ties", {"density": density})


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf, "1", None, False])
def test_scale_that_is_no_finite_number_is_refused(scale):
    assert "scale must be" in refused("task_arithmetic", {"scale": scale})


def test_numpy_numbers_are_numbers():
    check_knobs("ties", {"density": np.float64(0.5), "scale": 2})


@pytest.mark.parametrize("name", METHODS)
def test_nothing_to_merge_is_refused(name):
    with pytest.raises(UserError, match="no module"):
        merge(name, {})


def test_unknown_module_is_no_member():
    merged = merge("average", gaussian())
    assert "head" in merged and "no such module" not in merged and len(merged) == len(SHAPES)
    with pytest.raises(KeyError):
        merged["no such module"]


def test_a_method_is_one_function_and_one_row(monkeypatch):
    def loudest(updates, *, boost=1.0):
        """Everyone receives the last task's update."""
        return LazyUpdates(
            updates, lambda name: boost * updates[name][-1:].expand_as(updates[name])
        )

    monkeypatch.setitem(METHODS, "loudest", Method("loudest", loudest, "nowhere"))
    updates = gaussian()
    assert merge("loudest", updates, boost=2.0)["tall"][0].equal(2 * updates["tall"][3])
    assert "known: boost" in refused("loudest", {"scale": 1.0})
    assert "loudest" in refused("quietest", {})


HEAVY = "transformers", "peft", "datasets"


def heavy_imports(statement):
    code = f"{statement}; import sys; print(*(m for m in {HEAVY!r} if m in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def test_numbers_import_no_models():
    assert heavy_imports("import osrm.merging, osrm.task_vectors") == []


def test_the_check_of_imports_can_fail():
    pytest.importorskip("peft")
    assert "transformers" in heavy_imports("import peft")
