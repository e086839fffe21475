"""Every method against its oracle, and the theorems that hold whatever the numbers are."""

import json
import math
import subprocess
import sys
import weakref
import zlib
from collections import Counter
from collections.abc import Mapping
from itertools import pairwise, permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from osrm.errors import UserError
from osrm.merging import METHODS, Inputs, Lazy, Masked, Method, _updates, check_knobs, merge, row
from osrm.merging._updates import elect, pack
from osrm.merging.regmean import condition
from osrm.merging.ties import STRIDE, trim_threshold
from osrm.moments import Moment
from osrm.task_vectors import LoraPair, TaskVectors
from tests import oracles

ROOT = Path(__file__).parent.parent

WEIGHTS = [0.5, 2.0, 0.0, -1.0, 1.0, 3.0, 0.25, 1.5]
"""For up to eight tasks."""
CASES = [
    ("average", {}),
    ("average", {"weights": WEIGHTS}),
    ("task_arithmetic", {"scale": 0.3}),
    ("task_arithmetic", {"scale": -1.0, "weights": WEIGHTS}),
    ("ties", {"density": 0.2, "scale": 1.0}),
    ("ties", {"density": 0.9, "scale": 0.7}),
    ("ties", {"density": 1.0, "scale": 1.0}),
    ("ties", {"density": 1e-6, "scale": 1.0}),
    ("ties", {"density": 0.3, "scale": -0.5, "trim": "tensor"}),
    ("dare_linear", {"drop_rate": 0.4, "scale": 0.3}),
    ("dare_linear", {"drop_rate": 0.9, "seed": 3, "scale": 1.0, "weights": WEIGHTS}),
    ("dare_ties", {"drop_rate": 0.5, "seed": 1, "density": 0.5, "scale": 1.0}),
    ("dare_ties", {"drop_rate": 0.75, "density": 0.2, "scale": 0.7, "trim": "tensor"}),
    ("emr", {"scale": 0.7}),
    ("fisher", {"scale": 0.7}),
    ("regmean", {"ridge": 1e-3, "off_diagonal": 1.0}),
    ("regmean", {"ridge": 0.0, "off_diagonal": 0.9, "scale": 0.7}),
    ("regmean", {"ridge": 0.5, "off_diagonal": 0.0}),
    ("knots_ties", {"density": 1.0, "scale": 1.0}),
    ("knots_ties", {"density": 0.3, "scale": 0.7}),
    ("knots_ties", {"density": 0.6, "scale": 0.7, "trim": "tensor"}),
    ("core_space", {"inner": "task_arithmetic", "scale": 0.3}),
    ("core_space", {"inner": "tsv", "scale": 0.7}),
    ("core_space", {"inner": "ties", "scale": 1.0, "density": 0.3, "trim": "tensor"}),
    ("core_space", {"inner": "ties", "scale": 0.7, "density": 0.6, "trim": "global"}),
    ("tsv", {"scale": 0.7}),
    ("iso_c", {"scale": 0.7}),
    ("iso_cts", {"scale": 0.7}),
    ("iso_cts", {"scale": 1.0, "common": 0.3}),
    ("iso_cts", {"scale": 1.0, "common": 0.0}),
]
WEIGHED = [name for name, method in METHODS.items() if "weights" in method.knobs]
MEANS = ["average", "fisher", "regmean"]
"""Their weights are those of a mean."""
KEEPS_EQUAL_UPDATES = [
    ("average", {"weights": WEIGHTS}, False),
    ("task_arithmetic", {"scale": 0.25}, True),
    ("ties", {"density": 1.0, "scale": 0.7}, False),
    ("dare_linear", {"drop_rate": 0.0, "scale": 0.25}, True),
    ("dare_ties", {"drop_rate": 0.0, "scale": 0.7}, False),
    ("emr", {"scale": 0.7}, False),
    ("fisher", {"scale": 0.7}, False),
    ("regmean", {"ridge": 0.1, "off_diagonal": 0.5, "scale": 0.7}, False),
    ("knots_ties", {"density": 1.0, "scale": 0.7}, False),
    ("core_space", {"inner": "task_arithmetic", "scale": 0.25}, True),
    ("core_space", {"inner": "ties", "density": 1.0, "scale": 0.7}, False),
    ("core_space", {"inner": "tsv", "scale": 0.7}, False),
    ("tsv", {"scale": 0.7}, False),
]
"""method, knobs, and whether T equal updates add up (to T times one) instead of staying one"""
SHAPES = {"layer.1.query": (5, 7), "layer.0.value": (3, 11), "head": (1, 1), "tall": (19, 2)}
LARGE = {"wide": (16, 30), "tall": (40, 17)}


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


def factored(tasks=4, seed=0, shapes=SHAPES, ranks=(2, 3, 0, 1)):
    """Adapters of different ranks, also zero, and scalings; one task lacks a module."""
    rng = torch.Generator().manual_seed(seed)
    adapters = {}
    for task in range(tasks):
        adapters[str(task)] = pairs = {}
        for i, (name, (out, width)) in enumerate(shapes.items()):
            rank = ranks[(task + i) % len(ranks)]
            A, B = (torch.randn(*size, generator=rng) for size in ((rank, width), (out, rank)))
            pairs[name] = LoraPair(A, B, 2.0 / (1 + task))
    if tasks > 1:
        del adapters["1"][next(iter(shapes))]
    return TaskVectors.stack(adapters)


MAKERS = [gaussian, tied, with_silent_task, uneven, factored]


def is_defined(name, knobs, make):
    """Whether the result depends on the updates alone.

    TIES on coordinates depends on their basis where singular values are equal, as those of the
    identity are, which stands for a factor of a dense update; on its signs where sums are zero. A
    task far smaller than another is no direction of the core space.
    """
    if name == "core_space":
        return make is factored or (make is not uneven and knobs["inner"] != "ties")
    return name != "knots_ties" or make is not tied


MADE = [
    pytest.param(name, knobs, make, id=f"{name}-{i}-{make.__name__}")
    for i, (name, knobs) in enumerate(CASES)
    for make in MAKERS
    if is_defined(name, knobs, make)
]

PERMUTED = [tied, factored]


def task_names(updates):
    if isinstance(updates, TaskVectors):
        return updates.tasks
    return [str(task) for task in range(len(next(iter(updates.values()))))]


def selected(updates, names):
    """The updates of these tasks, in this order."""
    numbers = {name: number for number, name in enumerate(task_names(updates))}
    each = updates.updates if isinstance(updates, TaskVectors) else updates
    return TaskVectors.stack(
        {name: {module: each[module][numbers[name]] for module in updates} for name in names}
    )


def seen(updates, needs):
    """What a method needs beside the updates, made up: {module: [an array for each task]}."""
    arrays = {}
    for module in updates:
        _, out, width = updates[module].shape
        arrays[module] = []
        for task in task_names(updates):
            rng = np.random.default_rng(zlib.crc32(f"{module} of {task}".encode()))
            rows = out if needs == "fisher" else 40 + 10 * int(task)
            noise = rng.standard_normal((rows, width)) + 0.5
            values = np.maximum(noise, 0) ** 2 if needs == "fisher" else noise
            arrays[module].append(values.astype(np.float32))
    return arrays


def knobs_for(updates, knobs):
    """The knobs, with as many weights as there are tasks."""
    if knobs.get("weights") != WEIGHTS:
        return knobs
    return {**knobs, "weights": [WEIGHTS[int(task)] for task in task_names(updates)]}


def made_up(updates, needs):
    """Statistics, as the method wants them; None if it needs none."""
    if not needs:
        return None
    return {
        module: torch.stack([*map(torch.from_numpy, arrays)])
        if needs == "fisher"
        else [Moment.of(torch.from_numpy(array)) for array in arrays]
        for module, arrays in seen(updates, needs).items()
    }


def run(name, updates, dtype=torch.float32, **knobs):
    """The merge, with made-up statistics where the method needs some."""
    statistics = made_up(updates, METHODS[name].needs)
    return merge(name, updates, statistics, dtype=dtype, **knobs_for(updates, knobs))


def looked_up(merged):
    return {module: merged[module] for module in merged}


def exact(updates):
    """The dense updates in float64."""
    if not isinstance(updates, TaskVectors):
        return {module: deltas.double().numpy() for module, deltas in updates.items()}
    return {
        module: np.stack([B @ A for B, A in pairs])
        for module, pairs in exact_factors(updates).items()
    }


def exact_factors(updates):
    """{module: [(B, A) of each task]} with the scaling in B; a dense update is its own B."""
    if not isinstance(updates, TaskVectors):
        return {
            module: [(delta, np.eye(delta.shape[1])) for delta in deltas]
            for module, deltas in exact(updates).items()
        }
    return {
        module: [
            (pair.scaling * pair.B.double().numpy(), pair.A.double().numpy())
            for pair in updates.pairs(module)
        ]
        for module in updates
    }


def dropped(updates, **knobs):
    """What DARE leaves of each task's update, when the task is merged alone."""
    alone = [
        merge("dare_linear", selected(updates, [name]), dtype=torch.float64, **knobs)
        for name in task_names(updates)
    ]
    return {module: np.stack([each[module][0].numpy() for each in alone]) for module in updates}


def expected(name, updates, **knobs):
    """What the oracle gives."""
    knobs = dict(knobs_for(updates, knobs))
    if name.startswith("dare_"):
        drops = {knob: knobs.pop(knob) for knob in ("drop_rate", "seed") if knob in knobs}
        inner = {"dare_linear": oracles.task_arithmetic, "dare_ties": oracles.ties}[name]
        return inner(dropped(updates, **drops), **knobs)
    more = []
    if name == "core_space":
        more = [exact_factors(updates)]
    elif needs := METHODS[name].needs:
        more = [seen(updates, needs)]
    return getattr(oracles, name)(exact(updates), *more, **knobs)


def assert_equal(merged, expected, **tolerance):
    assert list(merged) == list(expected)
    for name in expected:
        torch.testing.assert_close(merged[name], torch.as_tensor(expected[name]), **tolerance)


def assert_near(merged, expected, tolerance=2e-5, floor=1e-6):
    """Equal up to `tolerance` of the largest entry that the task has in the module."""
    assert set(merged) == set(expected)
    for name in expected:
        pairs = [*zip(merged[name].double(), torch.as_tensor(expected[name]).double(), strict=True)]
        for received, wanted in pairs:
            allowed = floor + tolerance * float(wanted.abs().max())
            torch.testing.assert_close(received, wanted, rtol=0, atol=allowed)


def test_every_method_is_tested_and_configured():
    shipped = json.loads((ROOT / "hparams" / "merge.json").read_text())
    assert {name for name, _ in CASES} == set(METHODS) == set(shipped)
    for name, knobs in shipped.items():
        check_knobs(name, knobs)
        run(name, gaussian(), **knobs)


@pytest.mark.parametrize("name, knobs, make", MADE)
def test_method_equals_its_oracle(name, knobs, make):
    """To rounding in float32, and to nine digits in float64."""
    for tasks, dtype, tolerance in (
        (8, torch.float32, {}),
        (2, torch.float64, {"tolerance": 1e-9, "floor": 1e-12}),
    ):
        updates = make(tasks, seed=tasks)
        merged = looked_up(run(name, updates, dtype=dtype, **knobs))
        assert list(merged) == list(updates)
        assert {deltas.dtype for deltas in merged.values()} == {dtype}
        assert_near(merged, expected(name, updates, **knobs), **tolerance)


@pytest.mark.parametrize("name, knobs", CASES)
def test_factors_and_the_dense_updates_that_they_make_merge_alike(name, knobs):
    """Also where one task's are dense and the others' are not."""
    if is_defined(name, knobs, gaussian):
        updates = factored()
        dense = {module: updates[module] for module in updates}
        each = {module: [*updates.updates[module]] for module in updates}
        for module in updates:
            each[module][0] = dense[module][0]
        mixed = TaskVectors(updates.tasks, {module: tuple(each[module]) for module in updates})
        merged = looked_up(run(name, updates, **knobs))
        assert_near(run(name, dense, **knobs), merged, tolerance=1e-5)
        assert_near(run(name, mixed, **knobs), merged, tolerance=1e-5)


def test_ties_zero_sums_follow_the_majority_of_all_modules():
    cancelling = torch.tensor([[[2.0]], [[-2.0]]])
    others = torch.full((2, 1, 3), -1.0)
    merged = merge("ties", {"here": cancelling, "there": others}, density=1.0)
    assert merged["here"].flatten().tolist() == [-2, -2]
    balanced = torch.tensor([[[1.0, -1.0]], [[1.0, -1.0]]])
    merged = merge("ties", {"here": cancelling, "there": balanced}, density=1.0)
    assert merged["here"].flatten().tolist() == [0, 0]
    alone = merge("ties", {"here": cancelling, "there": others}, density=1.0, trim="tensor")
    assert alone["here"].flatten().tolist() == [0, 0]


@pytest.mark.parametrize("name", ["ties", "emr", "dare_ties"])
def test_election_is_exact_whatever_the_order_of_tasks(name):
    knobs = {"ties": {"density": 1.0}, "dare_ties": {"drop_rate": 0.0}}.get(name, {})
    negative = torch.full((3, 1, 2), -1.0)
    for order in permutations([1.0, 2.0**-30, -1.0]):
        close_race = torch.tensor(order)[:, None, None]
        merged = merge(name, {"close": close_race, "rest": negative}, **knobs)["close"]
        assert merged.amax() > 0 and merged.amin() >= 0


def test_ties_threshold_is_one_for_all_modules_or_one_for_each():
    updates = {"large": torch.full((1, 2, 2), 5.0), "small": torch.full((1, 4, 4), 0.1)}
    merged = merge("ties", updates, density=0.15)
    assert merged["large"].eq(5).all() and merged["small"].eq(0).all()
    assert_equal(merge("ties", updates, density=0.15, trim="tensor"), updates)


def test_emr_gives_each_task_its_own_mean_magnitude_back():
    updates = uneven()
    merged = merge("emr", updates)
    for task in range(4):
        own = sum(updates[name][task].abs().mean() for name in updates)
        received = sum(merged[name][task].abs().mean() for name in updates)
        torch.testing.assert_close(received, own)


def test_emr_task_that_agrees_nowhere_receives_zero():
    updates = {"w": torch.tensor([[[3.0, -3.0]], [[-1.0, 1.0]]])}
    assert merge("emr", updates)["w"].tolist() == [[[3, -3]], [[0, 0]]]


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (4, 8), (1, 17)])
def test_a_mask_is_packed_as_numpy_packs_bits(shape):
    rng = torch.Generator().manual_seed(0)
    mask = torch.rand(3, *shape, generator=rng) < 0.5
    packed = pack(mask)
    np.testing.assert_array_equal(
        packed.numpy(), np.packbits(mask.flatten(1).numpy(), axis=1, bitorder="little")
    )
    part = Masked(torch.randn(*shape, generator=rng), packed, torch.tensor([1.0, -2.0, 0.5]))
    for task, each in enumerate(mask):
        assert row(part, task).equal(part.rescaler[task] * each * part.unified)


@pytest.mark.parametrize("name, knobs, adds_up", KEEPS_EQUAL_UPDATES)
def test_equal_updates_merge_to_themselves(name, knobs, adds_up):
    """One task alone of any rank; several of a rank with room for all their singular vectors."""
    one = factored(1, shapes=LARGE, ranks=(2,)).updates
    alone = {module: pairs[0] for module, pairs in one.items()}
    equal = [TaskVectors.stack(dict.fromkeys(map(str, range(n)), alone)) for n in (1, 2, 3, 8)]
    for updates in (*equal, *(make(1) for make in MAKERS)):
        times = knobs.get("scale", 1.0) * (len(task_names(updates)) if adds_up else 1)
        wanted = {module: times * deltas for module, deltas in exact(updates).items()}
        assert_near(run(name, updates, **knobs), wanted)


@pytest.mark.parametrize("name, knobs, make", [each for each in MADE if each.values[2] in PERMUTED])
def test_permuting_tasks_permutes_rows_and_permuting_modules_nothing(name, knobs, make):
    order = [2, 0, 3, 1]
    updates = selected(make(), "0123")
    permuted = Turned(selected(updates, [str(task) for task in order]))
    merged = run(name, permuted, **knobs)
    assert list(merged) == list(reversed([*updates]))
    assert_near(merged, {m: each[order] for m, each in run(name, updates, **knobs).items()})


class Turned(TaskVectors):
    """The modules in reverse."""

    def __init__(self, updates):
        super().__init__(updates.tasks, dict(reversed(updates.updates.items())))


@pytest.mark.parametrize("name, knobs", CASES)
class TestTheorems:
    def test_zero_stays_zero(self, name, knobs):
        zero = {module: torch.zeros(3, *shape) for module, shape in SHAPES.items()}
        assert_equal(run(name, zero, **knobs), zero, rtol=0, atol=0)
        empty = factored(3, ranks=(0,))
        wanted = {module: empty[module] for module in empty}
        assert_equal(run(name, empty, **knobs), wanted, rtol=0, atol=0)

    def test_doubling_the_updates_doubles_the_merged(self, name, knobs):
        """Inputs are neither changed nor aliased, and what all tasks share is a view."""
        for tasks in (1, 4):
            updates = gaussian(tasks)
            before = {module: deltas.clone() for module, deltas in updates.items()}
            merged = looked_up(run(name, updates, **knobs))
            assert_equal(updates, before, rtol=0, atol=0)
            for module, deltas in updates.items():
                storage = merged[module].untyped_storage()
                assert storage.data_ptr() != deltas.untyped_storage().data_ptr()
        assert merged["tall"].shape == (4, 19, 2)
        assert name == "emr" or merged["tall"].stride(0) == 0
        doubled = {module: 2 * deltas for module, deltas in updates.items()}
        wanted = {module: 2 * merged[module] for module in updates}
        assert_near(run(name, doubled, **knobs), wanted, tolerance=1e-6, floor=0)

    def test_the_merged_is_linear_in_its_scale(self, name, knobs):
        """The search rescales what was merged with λ = 1; it must be what another λ gives."""
        if "scale" not in METHODS[name].knobs:
            assert "unknown knob 'scale'" in refused(name, {"scale": 1.0})
            return
        updates = gaussian()
        one = run(name, updates, **{**knobs, "scale": 1.0})
        for scale in (-0.3, 1.7, 1e-3):
            wanted = {module: scale * one[module] for module in updates}
            other = run(name, updates, **{**knobs, "scale": scale})
            assert_near(other, wanted, tolerance=1e-6, floor=1e-9)

    def test_half_precision_is_computed_in_float32(self, name, knobs):
        half = {module: deltas.bfloat16() for module, deltas in gaussian().items()}
        full = {module: deltas.float() for module, deltas in half.items()}
        assert_equal(run(name, half, **knobs), run(name, full, **knobs), rtol=0, atol=0)

    def test_the_size_of_blocks_does_not_matter(self, name, knobs, monkeypatch):
        shapes = {"long": (200, 6), "wide": (70, 40), "short": (3, 5)}
        both = [make(shapes=shapes) for make in (gaussian, factored)]
        wholes = [looked_up(run(name, updates, **knobs)) for updates in both]
        monkeypatch.setattr("osrm.merging._updates._BLOCK", 1)
        for updates, whole in zip(both, wholes):
            assert len([*Inputs(updates, torch.float32).blocks("long")]) > 1
            assert_near(run(name, updates, **knobs), whole, tolerance=1e-6)

    def test_lazy_input_gives_the_same_with_one_modules_stack_at_a_time(self, name, knobs):
        for make in (gaussian, tied):
            updates = Watched(make())
            merged = run(name, updates, **knobs)
            for module in merged:
                merged[module].sum()
            assert updates.most_alive == 1
            assert updates.alive() == 0
            if make is tied:
                assert_equal(merged, run(name, make(), **knobs), rtol=0, atol=0)


def small_statistics(needs, module, tasks, out, width):
    """As much as must be, and no more."""
    if needs == "fisher":
        return {module: torch.ones(1).expand(tasks, out, width)}
    return {module: [Moment(1, torch.ones(1, width)) + Moment(width, torch.eye(width))] * tasks}


class Largest(TorchDispatchMode):
    """Notes the largest memory of any tensor that is made."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, torch.Tensor):
                self.bytes = max(self.bytes, each.untyped_storage().nbytes())
        return result


def largest_tensors():
    """[method, bytes of the largest tensor made while one large module is merged], of each case."""
    torch.set_num_threads(1)
    _updates._BLOCK = 1
    updates = factored(shapes={"large": (700, 600)})
    largest_of = []
    for name, knobs in CASES:
        statistics = small_statistics(METHODS[name].needs, "large", 4, 700, 600)
        with Largest() as largest:
            merged = merge(name, updates, statistics, **knobs_for(updates, knobs))
            assert merged.parts["large"] is not None
        largest_of.append((name, largest.bytes))
    return largest_of


def heavy_imports():
    return [module for module in ("transformers", "peft", "datasets") if module in sys.modules]


@pytest.fixture(scope="module")
def fresh():
    """What an interpreter of its own says, in which beartype does not look values up."""
    code = (
        "import json; from tests import test_merging as t; largest = t.largest_tensors();"
        "before = t.heavy_imports(); import transformers;"
        "print(json.dumps([largest, before, t.heavy_imports()]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def test_factors_are_never_all_dense(fresh):
    """No tensor is as large as the dense updates of all tasks; Fisher's statistics are dense."""
    largest, _, _ = fresh
    assert len(largest) == len(CASES)
    for name, size in largest:
        assert 0 < size < 4 * 4 * 700 * 600 or name == "fisher", name


def test_numbers_import_no_models(fresh):
    _, before, after = fresh
    assert before == [] and after == ["transformers"]


def test_largest_sees_a_dense_stack():
    updates = factored(shapes={"large": (70, 60)})
    with Largest() as largest:
        updates["large"]
    assert largest.bytes == 4 * 4 * 70 * 60


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
    return vectors.abs().kthvalue(k, dim=1).values if k else vectors.new_zeros(len(vectors))


def streamed(updates, density, dtype=torch.float32):
    return trim_threshold(Inputs(updates, dtype), [*updates], density)


def entries(size, rng):
    """A vector of each kind of numbers, as the entries of tasks."""
    gaussian = torch.randn(1, size, generator=rng)
    kinds = {
        "gaussian": gaussian,
        "heavy ties": (gaussian * 2).round() / 2,
        "one value": torch.full((1, size), -0.1),
        "denormal": gaussian * 1e-42,
        "huge": gaussian * 1e37,
        "every exponent": gaussian.sign() * 10.0 ** (gaussian * 12).clamp(-44, 38),
        "nearly equal": 1 + gaussian * 1e-6,
        "zeros": torch.zeros(1, size),
        "signed zeros": torch.where(gaussian > 0, 0.0, -0.0),
    }
    return torch.cat([*kinds.values()])


@pytest.mark.parametrize("size", [1, 2, 3, 10, 101, 5000])
def test_streamed_threshold_is_the_kth_value(size):
    rng = torch.Generator().manual_seed(size)
    vectors = entries(size, rng)
    cuts = sorted({0, size // 3, size // 2, size})
    updates = {f"module {start}": vectors[:, None, start:end] for start, end in pairwise(cuts)}
    densities = [1.0, 0.9, 0.5, 0.2, 0.1, 1 / size, 1e-9, *torch.rand(4, generator=rng).tolist()]
    for density in densities:
        threshold = streamed(updates, density)
        torch.testing.assert_close(threshold, by_sorting(vectors, density), rtol=0, atol=0)


def test_streamed_threshold_of_float64_is_the_kth_value():
    vectors = 1 + torch.randn(3, 5000, generator=torch.Generator().manual_seed(0)).double() * 1e-12
    for density in (1.0, 0.9, 0.5, 0.2, 1e-9):
        threshold = streamed({"w": vectors[:, None]}, density, torch.float64)
        torch.testing.assert_close(threshold, by_sorting(vectors, density), rtol=0, atol=0)


class Counted(Inputs):
    """Counts how often each module is read."""

    def __init__(self, updates, dtype):
        super().__init__(updates, dtype)
        self.reads = Counter()

    def blocks(self, name, *args):
        self.reads[name] += 1
        return super().blocks(name, *args)


@pytest.mark.parametrize("seen", [0.0, 1e-3, 1e3])
@pytest.mark.parametrize("dtype, reads", [(torch.float32, 4), (torch.float64, 6)])
def test_a_sample_that_misleads_does_not_change_the_threshold(seen, dtype, reads):
    """All entries of the sample are equal, and few others are near."""
    vectors = entries(200 * STRIDE, torch.Generator().manual_seed(0)).to(dtype)
    vectors[:, ::STRIDE] = seen
    for density in (0.9, 0.5, 0.2):
        updates = Counted({"w": vectors[:, None]}, dtype)
        threshold = trim_threshold(updates, ["w"], density)
        torch.testing.assert_close(threshold, by_sorting(vectors, density), rtol=0, atol=0)
        assert updates.reads["w"] == reads


@pytest.mark.parametrize("most", [1, 10, 100])
def test_a_sample_of_any_size_will_do(most, monkeypatch):
    monkeypatch.setattr(_updates, "_BLOCK", 1)
    module = sys.modules["osrm.merging.ties"]  # The package has a function of this name.
    monkeypatch.setattr(module, "STRIDE", 1)
    monkeypatch.setattr(module, "SAMPLE", most)
    vectors = entries(5000, torch.Generator().manual_seed(0))
    for density in (0.9, 0.5, 0.2, 0.01):
        threshold = streamed({"w": vectors.unflatten(1, (100, 50))}, density)
        torch.testing.assert_close(threshold, by_sorting(vectors, density), rtol=0, atol=0)


@pytest.mark.parametrize("rows", [1, 7, 40])  # 7 are no multiple of what one look takes
def test_infinite_entries_are_the_largest(rows):
    vectors = entries(rows * 50, torch.Generator().manual_seed(0))
    vectors[:, ::3] = torch.inf
    for density in (0.9, 0.4, 0.2):
        threshold = streamed({"w": vectors.unflatten(1, (rows, 50))}, density)
        torch.testing.assert_close(threshold, by_sorting(vectors, density), rtol=0, atol=0)


def test_a_threshold_of_many_entries_takes_two_passes_and_none_at_density_one():
    updates = Counted(gaussian(1, shapes={"w": (2100, 2100)}), torch.float32)
    for density, reads in ((0.2, 2), (1.0, 2)):
        threshold = trim_threshold(updates, ["w"], density)
        assert threshold.equal(by_sorting(updates["w"].flatten(1), density))
        assert updates.reads["w"] == reads


NEARLY_ZERO = [
    [1.0, 2.0**-30, -1.0],
    [1.0, -1.0, 2.0**-30],
    [-1.0, -(2.0**-30), 1.0],
    [1.0, 1.0, -2.0],
    [1.0 + 2.0**-23, -1.0, -(2.0**-24)],
    [3e38, 3e38, -3e38],
    [1e-45, -1e-45, 1e-45],
    [0.0, -0.0, 0.0],
    [-0.0, -0.0, -2.0],
]


@pytest.mark.parametrize("tie", [-1, 1])
def test_the_elected_sign_is_that_of_the_sum_in_float64(tie):
    """Entry by entry, so that no other entry makes all sums be done again, and all together."""
    deltas = torch.cat([torch.tensor(NEARLY_ZERO), torch.randn(50, 3)]).T[:, None]
    for block in (deltas, *deltas.split(1, 2)):
        total, agreeing = elect(block, tie)
        wanted = np.sign(block.double().numpy().sum(0))
        np.testing.assert_array_equal(total.sign().numpy(), wanted)
        sign = np.where(wanted == 0, tie, wanted)
        np.testing.assert_array_equal(agreeing.numpy(), np.maximum(block.numpy() * sign, 0))


@pytest.mark.parametrize("out", [1, 64, 65, 66, 130])
@pytest.mark.parametrize("make", [factored, gaussian])
def test_blocks_are_the_rows_in_their_order_and_none_stands_alone(out, make, monkeypatch):
    monkeypatch.setattr(_updates, "_BLOCK", 1)
    updates = make(shapes={"w": (out, 6)})
    for more in ((), (64,)):
        rows, blocks = zip(
            *((r, b.clone()) for r, b in Inputs(updates, torch.float32).blocks("w", *more))
        )
        assert [*range(out)] == [i for r in rows for i in range(r.start, r.stop)]
        assert all(r.start % (more or (8,))[0] == 0 and r.stop - r.start > (out > 1) for r in rows)
        torch.testing.assert_close(torch.cat(blocks, 1), updates["w"], rtol=1e-6, atol=1e-7)


def test_the_number_of_trimmed_entries_is_cut_off_literally():
    updates = {"w": torch.arange(1.0, 11.0).reshape(1, 2, 5)}
    assert 10 * (1 - 0.9) < 1
    assert streamed(updates, 0.9).tolist() == [0]
    assert streamed(updates, 0.2).tolist() == [8]


class TestSideBySide:
    """Modules of factors, with several threads."""

    @pytest.fixture(params=[1, 3])
    def threads(self, request):
        before = torch.get_num_threads()
        torch.set_num_threads(request.param)
        yield request.param
        assert torch.get_num_threads() == request.param
        torch.set_num_threads(before)

    @pytest.mark.parametrize("name", METHODS)
    def test_the_result_is_the_same(self, name, threads, monkeypatch):
        merged, found = run(name, factored()), {}
        list(merged.calls(lambda module: found.update({module: merged[module]}), merged))
        monkeypatch.setattr(_updates, "SIDE_BY_SIDE", 1)
        wanted = looked_up(run(name, factored()))
        assert_equal({module: found[module] for module in wanted}, wanted, rtol=0, atol=0)

    def test_in_order_on_a_share_of_the_threads(self, threads):
        updates, shares = Inputs(factored(), torch.float32), []

        def call(name):
            shares.append(torch.get_num_threads())
            return name

        assert [*updates.side_by_side(call, updates)] == [*updates]
        assert {*shares} == {threads // min(threads, _updates.SIDE_BY_SIDE)}

    def test_an_error_ends_it(self, threads):
        updates = Inputs(factored(), torch.float32)
        with pytest.raises(KeyError):
            list(updates.side_by_side({}.__getitem__, updates))

    def test_dense_modules_are_one_at_a_time(self, threads):
        updates = Watched(gaussian())
        merged = run("ties", updates)
        list(merged.calls(lambda module: merged[module].sum(), merged))
        assert updates.most_alive == 1


class TestDare:
    """The coins: DARE on one task alone shows which entries it keeps."""

    BIG = TaskVectors.stack(
        {
            task: {module: torch.full((200, 50), 3.0) for module in ("first", "second")}
            for task in ("rte", "sst2", "stsb")
        }
    )

    @staticmethod
    def kept(updates, task="rte", module="first", method="dare_linear", **knobs):
        return merge(method, selected(updates, [task]), **knobs)[module][0] != 0

    @pytest.mark.parametrize("drop_rate", [0.0, 0.5, 0.75, 0.1, 0.97])
    def test_an_entry_is_dropped_or_made_up_for(self, drop_rate):
        updates = factored(1, shapes=LARGE, ranks=(2,))
        merged = merge("dare_linear", updates, drop_rate=drop_rate)
        for module in merged:
            received, own = merged[module][0], updates[module][0]
            there = received != 0
            assert drop_rate > 0 or there.all()
            rounding = 0 if drop_rate in (0, 0.5, 0.75) else 1e-6
            wanted = own[there] / (1 - drop_rate)
            torch.testing.assert_close(received[there], wanted, rtol=rounding, atol=0)

    @pytest.mark.parametrize("drop_rate", [0.1, 0.5, 0.9])
    def test_so_many_are_dropped_of_each_row_and_column_and_block(self, drop_rate):
        kept = self.kept(self.BIG, drop_rate=drop_rate).double()
        share, spread = 1 - drop_rate, (drop_rate * (1 - drop_rate)) ** 0.5
        for axis in ((0, 1), 0, 1):
            means = kept.mean(axis)
            limit = 5 * spread / (kept.numel() / means.numel()) ** 0.5
            assert (means - share).abs().max() < limit

    def test_the_mean_over_seeds_is_the_update(self):
        updates = gaussian(3, shapes={"w": (5, 7)})
        deltas, total = updates["w"], torch.zeros(5, 7)
        for seed in range(100):
            total += merge("dare_linear", updates, drop_rate=0.5, seed=seed)["w"][0] / 100
        spread = deltas.square().sum(0).sqrt() / 100**0.5
        assert ((total - deltas.sum(0)) / spread).abs().max() < 4

    def test_coins_of_other_tasks_modules_seeds_and_rows_are_others(self):
        masks = [
            self.kept(self.BIG, task, module, drop_rate=0.5, seed=seed)
            for task in ("rte", "sst2")
            for module in ("first", "second")
            for seed in (0, 1, -1)
        ]
        for i, one in enumerate(masks):
            assert len(one.unique(dim=0)) == 200
            for other in masks[:i]:
                assert abs((one == other).double().mean() - 0.5) < 0.05

    def test_coins_depend_on_seed_task_and_module_alone(self, monkeypatch):
        one = self.kept(self.BIG, "sst2", "second", drop_rate=0.5, seed=7)
        only = {"sst2": {"second": self.BIG["second"][1]}}
        assert merge("dare_linear", TaskVectors.stack(only), drop_rate=0.5, seed=7)["second"][
            0
        ].equal(6.0 * one)
        for order in (["rte", "sst2", "stsb"], ["stsb", "rte", "sst2"], ["sst2", "rte"]):
            for block in (2**22, 1):
                monkeypatch.setattr("osrm.merging._updates._BLOCK", block)
                both = selected(self.BIG, order)
                weights = [float(task == "sst2") for task in order]
                merged = merge("dare_linear", both, drop_rate=0.5, seed=7, weights=weights)
                assert (merged["second"][0] != 0).equal(one)
        in_double = merge(
            "dare_linear", selected(self.BIG, ["sst2"]), dtype=torch.float64, drop_rate=0.5, seed=7
        )
        assert (in_double["second"][0] != 0).equal(one)

    def test_dare_ties_drops_the_same_entries(self):
        linear, ties = (
            self.kept(self.BIG, method=method, drop_rate=0.5)
            for method in ("dare_linear", "dare_ties")
        )
        assert linear.equal(ties)

    def test_without_drops_it_is_task_arithmetic_or_ties(self):
        updates = factored()
        for dare, plain in (("dare_linear", "task_arithmetic"), ("dare_ties", "ties")):
            knobs = {"scale": 0.7, **({"density": 0.5} if plain == "ties" else {})}
            assert_near(
                merge(dare, updates, drop_rate=0.0, **knobs), merge(plain, updates, **knobs)
            )


class TestWeights:
    @pytest.mark.parametrize("make", [gaussian, factored])
    @pytest.mark.parametrize("name", WEIGHED)
    def test_weights_of_one_change_nothing(self, name, make):
        ones = run(name, make(), weights=[1.0] * 4)
        assert_near(ones, looked_up(run(name, make())), tolerance=1e-6)

    @pytest.mark.parametrize("make", [gaussian, factored])
    @pytest.mark.parametrize("name", [name for name in WEIGHED if name not in MEANS])
    def test_a_weight_multiplies_the_update(self, name, make):
        """Also a negative one, and zero."""
        factors = make is factored
        each = make().updates if factors else make()
        weights = torch.tensor([0.5, -2.0, 0.0, 1.5])
        weighted = {
            module: tuple(pair.scaled(float(w)) for pair, w in zip(updates, weights))
            if factors
            else weights[:, None, None] * updates
            for module, updates in each.items()
        }
        if factors:
            weighted = TaskVectors(make().tasks, weighted)
        merged = run(name, make(), weights=weights.tolist())
        assert_near(merged, looked_up(run(name, weighted)))

    @pytest.mark.parametrize("name", [*MEANS, "task_arithmetic"])
    def test_a_weight_of_two_is_the_task_twice(self, name):
        updates, twice = gaussian(3), {m: each[[0, 0, 1, 2]] for m, each in gaussian(3).items()}
        needs = METHODS[name].needs
        statistics = made_up(updates, needs)
        repeated = {
            module: each[[0, 0, 1, 2]] if needs == "fisher" else [each[0], *each]
            for module, each in (statistics or {}).items()
        }
        two = merge(name, updates, statistics, weights=[2.0, 1.0, 1.0])
        assert_near(two, {m: each[1:] for m, each in merge(name, twice, repeated).items()})

    def test_a_task_and_minus_it_are_nothing(self):
        updates = {module: each[[0, 1, 0]] for module, each in gaussian(2).items()}
        merged = merge("task_arithmetic", updates, weights=[1.0, 0.5, -1.0])
        assert_near(merged, {module: 0.5 * each[[1, 1, 1]] for module, each in updates.items()})

    def test_condition_is_that_of_the_weighted_equations(self):
        moments = [Moment.of(torch.randn(9, 4)) for _ in range(2)]
        assert condition([moments[0], *moments]) == pytest.approx(
            condition(moments, weights=[2.0, 1.0])
        )


class TestRegMean:
    @pytest.mark.parametrize("ridge, off_diagonal", [(0.0, 1.0), (0.3, 1.0), (0.1, 0.5)])
    def test_it_has_the_least_squared_error_of_outputs(self, ridge, off_diagonal):
        updates = gaussian(3)
        knobs = {"ridge": ridge, "off_diagonal": off_diagonal}
        merged = run("regmean", updates, dtype=torch.float64, **knobs)
        rng = np.random.default_rng(0)
        for module, inputs in seen(updates, "moments").items():
            moments = [oracles.second_moment(rows, ridge, off_diagonal) for rows in inputs]
            taus = exact(updates)[module]

            def error(W):
                pairs = zip(taus, moments)  # noqa: B023
                return sum(np.trace((W - tau) @ G @ (W - tau).T) for tau, G in pairs)

            if ridge == 0:
                W = rng.standard_normal(taus[0].shape)
                outputs = [
                    (rows.astype(np.float64) @ (W - tau).T) for tau, rows in zip(taus, inputs)
                ]
                by_rows = sum(np.mean(np.sum(each**2, axis=1)) for each in outputs)
                assert error(W) == pytest.approx(by_rows)
            best = merged[module][0].numpy()
            for step in (1e-3, 1e-1, 10):
                for _ in range(5):
                    assert error(best + step * rng.standard_normal(best.shape)) > error(best)

    def test_fewer_inputs_than_columns_will_do_with_a_ridge(self):
        updates = gaussian(2, shapes=LARGE)
        inputs = {m: np.stack([arrays[:5] for arrays in a]) for m, a in self.inputs(updates)}
        moments = {m: [Moment.of(torch.from_numpy(rows)) for rows in inputs[m]] for m in inputs}
        assert all(moment.is_rows for each in moments.values() for moment in each)
        merged = merge("regmean", updates, moments, ridge=1e-2)
        assert_near(merged, oracles.regmean(exact(updates), inputs, 1e-2, 1.0))

    @staticmethod
    def inputs(updates):
        return seen(updates, "moments").items()

    @pytest.mark.parametrize("ridge, off_diagonal", [(0.0, 1.0), (0.3, 0.9), (1e-3, 0.0)])
    def test_condition_is_the_ratio_of_eigenvalues(self, ridge, off_diagonal):
        for _, inputs in self.inputs(gaussian(3)):
            total = sum(oracles.second_moment(rows, ridge, off_diagonal) for rows in inputs)
            values = np.linalg.eigvalsh(total)
            moments = [Moment.of(torch.from_numpy(rows)) for rows in inputs]
            found = condition(moments, ridge=ridge, off_diagonal=off_diagonal)
            assert found == pytest.approx(values[-1] / values[0], rel=1e-6)

    @pytest.mark.parametrize("silent", ["no vectors", "zeros"])
    def test_what_no_task_has_features_for_gets_the_mean(self, silent):
        updates = gaussian(2)
        rows = {"no vectors": 0, "zeros": 99}[silent]
        dead = {
            module: [Moment.of(torch.zeros(rows, d.shape[2]))] * 2 for module, d in updates.items()
        }
        assert_near(merge("regmean", updates, dead), merge("average", updates))

    def test_singular_equations_are_refused_by_name(self):
        updates = gaussian(2)
        moments = {m: [Moment.of(torch.eye(deltas.shape[2]))] * 2 for m, deltas in updates.items()}
        moments["tall"] = [Moment.of(torch.ones(1, 2))] * 2
        merged = merge("regmean", updates, moments, ridge=0.0)
        with pytest.raises(UserError, match="equations of tall are singular; take a larger ridge"):
            merged["tall"]
        assert condition(moments["tall"], ridge=0.0) > 1e12


def test_fisher_weighs_tasks_alike_however_large_their_gradients():
    updates = gaussian(3)
    loudness = torch.tensor([1.0, 1e3, 1e5])[:, None, None]
    information = {m: deltas.square() + 0.1 for m, deltas in gaussian(3, seed=1).items()}
    louder = {m: each * loudness for m, each in information.items()}
    merged = merge("fisher", updates, information)
    assert_near(merge("fisher", updates, louder), merged, tolerance=1e-4)


class TestCoreSpace:
    @pytest.mark.parametrize("make", MAKERS)
    def test_task_arithmetic_in_the_core_is_plain_task_arithmetic(self, make):
        updates = make()
        inner = merge("core_space", updates, inner="task_arithmetic", scale=0.3)
        assert_near(inner, merge("task_arithmetic", updates, scale=0.3))

    @pytest.mark.parametrize("tasks", [1, 2, 5])
    def test_tsv_in_the_core_is_plain_tsv_where_ranks_leave_room(self, tasks):
        updates = factored(tasks, shapes=LARGE, ranks=(2, 3, 0, 1))
        assert_near(merge("core_space", updates, inner="tsv"), merge("tsv", updates))


def test_the_authors_tsv_of_identical_updates_is_larger_and_arbitrary():
    """They keep the null directions of the polar factors; the oracle and ours leave them out."""
    B, A = factored(1, shapes={"w": (40, 30)}, ranks=(3,)).pairs("w")[0].factors(torch.float64)
    one = (B @ A).numpy()
    U, values, Vh = oracles.svd(one)
    theirs = []
    for noise in (0, 1e-12):
        rng = np.random.default_rng(0)
        polars = []
        for columns in (np.tile(U, 4), np.tile(Vh.T, 4)):
            columns = columns + noise * rng.standard_normal(columns.shape)
            P, _, Qh = np.linalg.svd(columns, full_matrices=False)
            polars.append(P @ Qh)
        theirs.append(polars[0] @ np.diag(np.tile(values, 4)) @ polars[1].T)
    norm = np.linalg.norm(one)
    assert np.linalg.norm(theirs[0]) == pytest.approx(2 * norm)
    assert np.linalg.norm(theirs[0] - theirs[1]) > 0.1 * norm
    ours = merge("tsv", {"w": torch.from_numpy(np.stack([one] * 4))}, dtype=torch.float64)
    torch.testing.assert_close(ours["w"][0], torch.from_numpy(one))


AUTHORS_ISO_CTS = {
    0.8: [
        [5.067131, -2.278680, 1.652964, -1.850779, 1.976859],
        [2.774260, 1.654605, -1.458464, 5.245383, 0.926526],
        [-1.269433, 0.210564, 5.864142, 2.131489, 0.588758],
        [1.283430, 5.740606, 0.873053, -2.321710, 0.423703],
    ],
    0.5: [
        [5.558448, -0.496726, 0.946009, -3.342834, 2.352210],
        [3.625326, 1.299023, -1.358395, 5.655532, 0.291058],
        [-0.315001, -0.367417, 6.683319, 1.859581, 0.621630],
        [-0.541535, 6.787787, 0.576262, -1.119374, 0.890538],
    ],
}
"""{common: what `iso_cts` of iso-merging (github.com/danielm1405, src/utils/iso.py at d34010a)
gives of the two updates below, in float64}"""


@pytest.mark.parametrize("common, theirs", AUTHORS_ISO_CTS.items())
def test_iso_cts_is_the_authors_where_the_sum_has_full_rank(common, theirs):
    first = [[4, 1, 0, -2, 1], [1, 3, -1, 0, 2], [0, 2, 5, 1, -1], [2, 0, 1, 3, 0]]
    second = [[1, -3, 2, 0, 1], [2, 1, 0, 4, -1], [-1, 0, 3, 1, 2], [0, 5, 1, -2, 1]]
    updates = torch.tensor([first, second]).float()
    ours = merge("iso_cts", {"w": updates}, common=common)["w"]
    torch.testing.assert_close(ours[0], torch.tensor(theirs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("make", MAKERS)
def test_iso_cts_with_common_directions_alone_is_iso_c(make):
    assert_near(merge("iso_cts", make(), common=1.0), merge("iso_c", make()))


def test_merges_of_low_rank_are_kept_as_factors():
    updates = factored(shapes=LARGE)
    for name, knobs in CASES:
        parts = run(name, updates, **knobs).parts
        low = name not in ("ties", "dare_linear", "dare_ties", "emr", "fisher")
        for module in updates:
            assert isinstance(parts[module], LoraPair) == low, name
            if low:
                assert len(parts[module].A) <= sum(len(p.A) for p in updates.pairs(module))


class TestPeft:
    """What PEFT computes too, on the same matrices."""

    def test_task_arithmetic_is_peft_s_cat(self):
        peft = pytest.importorskip("peft")
        updates = factored(3, shapes={"layer": (19, 8)}, ranks=(2, 3, 1))
        weights = [0.5, 2.0, 1.5]
        model = torch.nn.Sequential()
        model.add_module("layer", torch.nn.Linear(8, 19, bias=False))
        for task, pair in zip(updates.tasks, updates.pairs("layer")):
            rank = len(pair.A)
            config = peft.LoraConfig(
                r=max(1, rank), lora_alpha=pair.scaling * rank, target_modules=["layer"]
            )
            if isinstance(model, peft.PeftModel):
                model.add_adapter(task, config)
            else:
                model = peft.get_peft_model(model, config, adapter_name=task)
        layer = model.base_model.model.layer
        pairs = updates.pairs("layer")
        names = []
        for task, pair in zip(updates.tasks, pairs):
            if len(pair.A):
                layer.lora_A[task].weight.data = pair.A
                layer.lora_B[task].weight.data = pair.B
                names.append(task)
        used = [weights[int(task)] for task in names]
        model.add_weighted_adapter(names, used, "merged", combination_type="cat")
        merged = merge("task_arithmetic", selected(updates, names), weights=used)
        torch.testing.assert_close(merged["layer"][0], layer.get_delta_weight("merged").detach())

    @pytest.mark.parametrize("tasks", [1, 2, 5])
    def test_functions_on_whole_matrices_give_the_same(self, tasks):
        utils = pytest.importorskip("peft.utils.merge_utils")
        updates = gaussian(tasks)
        weights = WEIGHTS[:tasks]
        summed = merge("task_arithmetic", updates, weights=weights)
        for module, deltas in updates.items():
            theirs = utils.task_arithmetic([*deltas], torch.tensor(weights))
            torch.testing.assert_close(summed[module][0], theirs)
            for density in (0.2, 0.5, 0.9):
                # They keep ⌊density P⌋ entries; we, as MergeLM, all from the ⌊(1 - density) P⌋-th
                # on, it too. Entries that sum to zero are positive to them and follow the
                # majority here: random numbers have none. They weigh after the election.
                size = deltas[0].numel()
                kept = size - max(0, int(size * (1 - density)) - 1)
                if kept == size:
                    continue
                theirs = utils.ties([*deltas], torch.ones(tasks), (kept + 0.5) / size, "total")
                ours = merge("ties", updates, density=density, trim="tensor")[module][0]
                torch.testing.assert_close(ours, theirs)

    def test_dare_without_drops_is_theirs(self):
        utils = pytest.importorskip("peft.utils.merge_utils")
        updates = gaussian(3)
        merged = merge("dare_ties", updates, drop_rate=0.0, density=1.0, trim="tensor")
        for module, deltas in updates.items():
            with pytest.warns(UserWarning, match="no pruning"):
                theirs = utils.dare_ties([*deltas], torch.ones(3), 1.0, "total")
            torch.testing.assert_close(merged[module][0], theirs)


def refused(name, knobs, updates=None, statistics=None):
    with pytest.raises(UserError) as caught:
        merge(name, NothingToRead() if updates is None else updates, statistics, **knobs)
    message = str(caught.value)
    assert "\n" not in message
    return message


class NothingToRead(dict):
    def __iter__(self):
        raise AssertionError("work began before the settings were checked")

    __getitem__ = keys = values = items = __iter__


def test_unknown_method_is_refused_with_those_known():
    assert refused("tiess", {}) == (
        f"unknown merging method 'tiess': choose one of {', '.join(METHODS)}"
    )


def test_every_problem_with_knobs_is_named_in_one_line():
    assert refused("ties", {"densty": 0.2, "density": 0, "scale": math.nan}) == (
        "merging method 'ties': unknown knob 'densty' (known: density, scale, trim, weights); "
        "density: expected a number in (0, 1], found 0; scale: expected a finite number, found nan"
    )
    assert "unknown knob 'scale' (known: weights)" in refused("average", {"scale": 1.0})
    # What they need beside the updates is no knob.
    assert "unknown knob 'updates' (known: scale, weights)" in refused("fisher", {"updates": 1.0})


NO_NUMBER = [math.nan, math.inf, -math.inf, "1", None, False, [0.2]]


@pytest.mark.parametrize(
    "name, knob, values",
    [
        ("ties", "density", [0, -0.1, 1.0001, *NO_NUMBER]),
        ("task_arithmetic", "scale", NO_NUMBER),
        ("iso_cts", "common", [-0.1, 1.1, *NO_NUMBER]),
        ("dare_linear", "drop_rate", [1, 1.5, -0.1, *NO_NUMBER]),
        ("dare_ties", "drop_rate", [1.0]),
        ("dare_ties", "seed", [0.5, True, "0", None]),
        ("regmean", "ridge", [-1e-3, *NO_NUMBER]),
        ("regmean", "off_diagonal", [-0.1, 1.1, *NO_NUMBER]),
        ("ties", "trim", ["layer", "", None, 1, ["global"]]),
        ("knots_ties", "trim", ["layer"]),
        ("core_space", "inner", ["emr", None, ["tsv"]]),
        ("average", "weights", ["11", 1.0, [1, math.nan], [1, math.inf], [1, "1"], [1, True]]),
        ("task_arithmetic", "weights", [[None, 1.0]]),
    ],
)
def test_a_knob_outside_its_range_is_refused(name, knob, values):
    for value in values:
        assert f"{knob}: expected " in refused(name, {knob: value})


@pytest.mark.parametrize("name", WEIGHED)
@pytest.mark.parametrize("weights", [[], [1.0], [1.0] * 5])
def test_weights_of_another_number_than_the_tasks_are_refused(name, weights):
    message = refused(name, {"weights": weights}, gaussian(4), {})
    assert f"{len(weights)} of them for 4 tasks" in message


@pytest.mark.parametrize("name", ["regmean", "fisher"])
@pytest.mark.parametrize("weights", [[2.0, -1.0], [0.0, 0.0]])
def test_means_by_features_and_by_gradients_refuse_weights_below_zero(name, weights):
    assert "weights: expected numbers of at least 0" in refused(name, {"weights": weights})


def test_weights_that_have_no_mean_are_refused_by_the_average():
    assert "sum to 0" in refused("average", {"weights": [1.0, -1.0]}, gaussian(2))
    assert "sum to 0" in refused("average", {"weights": [0.0, 0.0]}, gaussian(2))
    assert "sum to 0" in refused("average", {"weights": [0.1, 0.2, -0.3]}, gaussian(3))
    assert merge("task_arithmetic", gaussian(2), weights=[1.0, -1.0])


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].needs])
def test_lacking_statistics_are_refused(name):
    assert f"needs {METHODS[name].needs}" in refused(name, {}, gaussian())


def test_numpy_numbers_are_numbers():
    check_knobs("ties", {"density": np.float64(0.5), "scale": 2})


@pytest.mark.parametrize("name", METHODS)
def test_nothing_to_merge_is_refused(name):
    with pytest.raises(UserError, match="no module"):
        merge(name, {})


def test_unknown_module_is_no_member():
    for name in METHODS:
        merged = run(name, gaussian())
        assert "head" in merged and "no such module" not in merged and len(merged) == len(SHAPES)
        with pytest.raises(KeyError):
            merged["no such module"]


def test_a_method_is_one_function_and_one_row(monkeypatch):
    def loudest(updates, statistics, *, boost=1.0):
        """Everyone receives the last task's update, as one matrix."""
        return Lazy(updates, lambda name: boost * statistics[name] * updates[name][-1])

    method = Method(loudest, "nowhere", needs="patience")
    monkeypatch.setitem(METHODS, "loudest", method)
    updates = gaussian()
    merged = merge("loudest", updates, dict.fromkeys(updates, 3), boost=2.0)["tall"]
    assert merged.shape == (4, 19, 2) and merged[0].equal(6 * updates["tall"][3])
    assert "known: boost" in refused("loudest", {"scale": 1.0})
    assert "needs patience" in refused("loudest", {}, updates)
    assert "loudest" in refused("quietest", {})


@pytest.mark.parametrize("form", ["shared", "rows", "pair", "masked"])
def test_every_form_of_a_part_is_read_alike(form, monkeypatch):
    rng = torch.Generator().manual_seed(0)
    A, B, stack = (torch.randn(*s, generator=rng) for s in ((2, 5), (3, 2), (4, 3, 5)))
    mask = stack > 0
    part, wanted = {
        "shared": (stack[0], stack[:1].expand(4, 3, 5)),
        "rows": (stack, stack),
        "pair": (LoraPair(A, B, 2.0), (2 * B @ A).expand(4, 3, 5)),
        "masked": (
            Masked(stack[0], pack(mask), torch.arange(4.0)),
            torch.arange(4.0)[:, None, None] * mask * stack[0],
        ),
    }[form]
    method = Method(lambda updates: Lazy(updates, lambda _: part), "nowhere")
    monkeypatch.setitem(METHODS, "toy", method)
    merged = merge("toy", {"w": stack})
    torch.testing.assert_close(merged["w"], wanted)
    for task in range(4):
        torch.testing.assert_close(row(merged.parts["w"], task), wanted[task])
