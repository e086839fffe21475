"""Sufficient statistics add and subtract: however the rows are split, nothing changes."""

from functools import reduce
from operator import add

import numpy as np
import pytest
import torch

from osrm.moments import Moment, own_and_others

D = 6


def rows(n: int, seed: int, offset: float = 3.0, d: int = D) -> torch.Tensor:
    """Correlated float32 rows far from the origin."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=generator)
    return torch.randn(n, d, generator=generator) @ mixing + offset


def sum_of(x: torch.Tensor) -> np.ndarray:
    """Σ x xᵀ, one row at a time."""
    vectors = x.double().numpy()
    return sum((np.outer(v, v) for v in vectors), np.zeros((x.shape[1], x.shape[1])))


def assert_statistic_of(found: Moment, x: torch.Tensor) -> None:
    expected = sum_of(x)
    assert found.count == len(x)
    rounding = 1e-13 * max(1.0, np.trace(expected))
    np.testing.assert_allclose(found.gram.numpy(), expected, rtol=0, atol=rounding)


# -- two forms of one statistic ----------------------------------------------------------------


@pytest.mark.parametrize("n", range(2 * D + 1))
def test_few_vectors_stay_as_they_are_and_many_become_a_sum(n):
    x = rows(n, seed=n)
    found = Moment.of(x)
    assert found.is_rows == (n < D)
    if found.is_rows:
        assert torch.equal(found.data, x) and found.data.dtype == torch.float32
    else:
        assert found.data.shape == (D, D) and found.data.dtype == torch.float64
    assert found.gram.dtype == torch.float64
    assert_statistic_of(found, x)


@pytest.mark.parametrize("d", [255, 256, 257, 600])
def test_the_sum_of_a_wide_layer(d):
    """However the product is cut up: symmetric to the last bit, too."""
    x = torch.randn(d + 10, d, generator=torch.Generator().manual_seed(d))
    found, array = Moment.of(x).gram, x.double().numpy()
    np.testing.assert_allclose(found.numpy(), array.T @ array, rtol=0, atol=1e-11 * d)
    assert torch.equal(found, found.T)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 4, 50])
def test_every_precision_is_summed_in_float64(dtype, n):
    x = rows(n, seed=n).to(dtype)
    found = Moment.of(x)
    assert found.data.dtype == (torch.float32 if n < D else torch.float64)
    assert_statistic_of(found, x)


def test_small_energies_are_not_lost_beside_large_ones():
    """In float32 the rounding of the large energies would hide those below 1e-7 of them."""
    x = rows(5000, seed=1, offset=1e4).round()
    step = torch.arange(5000) % 3 - 1  # -1, 0, 1: of energy 2/3
    x[:, 0] = x[:, 1] + step
    axis = torch.tensor([[1.0, -1.0, 0, 0, 0, 0]])
    expected = float(step.double().square().mean())
    found = reduce(add, (Moment.of(batch) for batch in x.split(16)))
    assert found.energy(axis) == pytest.approx(expected, rel=1e-6)
    in_float32 = sum((batch.T @ batch for batch in x.split(16)), torch.zeros(D, D)) / 5000
    assert abs(float(axis @ in_float32 @ axis.T) - expected) > expected


# -- addition ----------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [0, 1, 2, 5, 6, 9])
@pytest.mark.parametrize("second", [0, 1, 3, 4, 6, 40])
def test_statistics_of_two_parts_add_up(first, second):
    x = rows(first + second, seed=first)
    found = Moment.of(x[:first]) + Moment.of(x[first:])
    assert found.is_rows == (first + second < D), "the form depends on the count alone"
    assert_statistic_of(found, x)


@pytest.mark.parametrize("total", [5, 6, 64])
@pytest.mark.parametrize("seed", range(5))
def test_neither_the_split_nor_the_order_of_batches_matters(total, seed):
    x = rows(total, seed=7)
    generator = torch.Generator().manual_seed(seed)
    cuts = sorted(torch.randint(0, total + 1, (9,), generator=generator).tolist())  # some empty
    batches = [x[a:b] for a, b in zip([0, *cuts], [*cuts, total])]
    order = torch.randperm(len(batches), generator=generator)
    found = reduce(add, (Moment.of(batches[i]) for i in order))
    assert found.is_rows == (total < D)
    assert_statistic_of(found, x)


def test_adding_leaves_both_parts_alone():
    for n in (2, 20):
        first, second = Moment.of(rows(n, seed=1)), Moment.of(rows(n, seed=2))
        before = first.data.clone(), second.data.clone()
        total = first + second
        total.data.zero_()
        assert torch.equal(first.data, before[0]) and torch.equal(second.data, before[1])


# -- subtraction -------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0, 1, 5, 6, 40])
@pytest.mark.parametrize("removed", [0, 1, 5, 6, 40])
def test_subtraction_takes_back_what_was_added(kept, removed):
    x = rows(kept + removed, seed=kept)
    assert_statistic_of(Moment.of(x) - Moment.of(x[kept:]), x[:kept])


SIZES = {
    "few each, few together": {"a": 1, "b": 2, "c": 1},
    "few each, many together": {"a": 3, "b": 2, "c": 4},
    "few and many": {"a": 2, "b": 30, "c": 5, "d": 9},
    "many": {"a": 30, "b": 20, "c": 40},
    "one none": {"a": 0, "b": 3, "c": 20},
    "one alone": {"a": 4},
    "one alone, many": {"a": 40},
}


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_the_statistic_of_the_others_is_that_of_their_vectors(sizes, scale):
    x = {name: rows(n, seed=i) for i, (name, n) in enumerate(sizes.items())}
    x["a"] = x["a"] * scale
    moments = {name: Moment.of(each) for name, each in x.items()}
    for name, own, others in own_and_others(moments, [*moments, "foreign"], moments):
        expected = [rows for other, rows in x.items() if other != name]
        assert own is moments.get(name) and (others is None) == (not expected)
        if others:
            assert_statistic_of(others, torch.cat(expected))


def test_others_are_those_that_are_named_and_exist():
    moments = {name: Moment.of(rows(40, seed=ord(name))) for name in "abc"}
    found = {task: rest for task, _, rest in own_and_others(moments, "abx", "bcx")}
    assert_statistic_of(found["b"], rows(40, seed=ord("c")))
    for task in "ax":
        assert_statistic_of(found[task], torch.cat([rows(40, seed=ord(name)) for name in "bc"]))
    assert [*own_and_others({}, "a", "ab")] == [("a", None, None)]


def others_of(task, moments):
    ((_, _, others),) = own_and_others(moments, [task], moments)
    return others


def test_few_others_stay_vectors():
    left = others_of("c", {name: Moment.of(rows(1, seed=ord(name))) for name in "abcde"})
    assert left.is_rows and left.count == 4


def test_others_cost_one_addition_and_one_subtraction_a_task(monkeypatch):
    """Adding the T - 1 others of each of the T tasks up anew would take T² additions."""
    moments = {name: Moment.of(rows(40, seed=ord(name))) for name in "abcde"}
    calls = []
    for name in ("__add__", "__sub__"):
        plain = getattr(Moment, name)
        monkeypatch.setattr(Moment, name, lambda *x, f=plain: calls.append(f) or f(*x))
    assert len([*own_and_others(moments, moments, moments)]) == 5
    assert len(calls) == 4 + 5


@pytest.mark.parametrize("factor", [1.0, 1e3, 1e9])
def test_the_null_space_of_the_others_survives_one_task_of_much_more_energy(factor):
    """The rounding of the large task's energy must not stand in for that of the others."""
    axes = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(0)))[0]
    own, first, second = (rows(40, seed=seed) for seed in range(3))
    null, rest = axes[:2].double(), axes[2:]
    moments = {"own": Moment.of(own * factor)}
    moments |= {"first": Moment.of(first[:, 2:].double() @ rest.double())}
    moments |= {"second": Moment.of(second[:, 2:].double() @ rest.double())}
    left = others_of("own", moments)
    assert abs(left.energy(null)) < 1e-12 * left.mean_energy


# -- what is read off it -----------------------------------------------------------------------

COUNTS = [1, 2, 5, 6, 7, 50]


@pytest.mark.parametrize("n", COUNTS)
def test_products_and_energies_are_those_of_the_second_moment(n):
    x = rows(n, seed=n)
    found, expected = Moment.of(x), sum_of(x) / n
    V = rows(4, seed=99)
    A = V.double().numpy()
    np.testing.assert_allclose(found.times(V.T).numpy(), expected @ A.T, rtol=1e-10)
    energy = np.mean([np.linalg.norm(A @ v) ** 2 for v in x.double().numpy()])
    assert found.energy(V) == pytest.approx(energy, rel=1e-12)
    assert found.energy(V) == pytest.approx(np.trace(A @ expected @ A.T), rel=1e-12)
    assert found.mean_energy == pytest.approx(np.linalg.eigvalsh(expected).mean(), rel=1e-12)


@pytest.mark.parametrize("shift", [1e-6, 1e-2, 1.0, 1e4])
@pytest.mark.parametrize("n", COUNTS)
def test_shifted_inverse_solves(n, shift):
    x, V = rows(n, seed=n), rows(4, seed=99).T.double()
    found = Moment.of(x).shifted_inverse(shift)(V).numpy()
    matrix = sum_of(x) / n + shift * np.eye(D)
    tolerance = 1e-14 * np.linalg.cond(matrix)
    expected = np.linalg.solve(matrix, V.numpy())
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * abs(expected).max())
    np.testing.assert_allclose(matrix @ found, V.numpy(), rtol=0, atol=1e3 * tolerance)


def test_shifted_inverse_leaves_the_statistic_alone():
    for n in COUNTS:
        moment = Moment.of(rows(n, seed=n))
        before = moment.data.clone()
        moment.shifted_inverse(0.5)
        assert torch.equal(moment.data, before)


def test_the_two_forms_of_the_same_vectors_agree():
    x = rows(4, seed=3)
    few, many = Moment.of(x), Moment(4, Moment.of(x).gram)
    assert few.is_rows and not many.is_rows
    V = rows(3, seed=99).double()
    torch.testing.assert_close(few.times(V.T), many.times(V.T), rtol=1e-12, atol=0)
    solve, other = few.shifted_inverse(0.1), many.shifted_inverse(0.1)
    torch.testing.assert_close(solve(V.T), other(V.T), rtol=1e-8, atol=1e-8)
    assert few.energy(V) == pytest.approx(many.energy(V), rel=1e-12)
    assert few.mean_energy == pytest.approx(many.mean_energy, rel=1e-12)


def test_no_vectors_have_no_energy():
    none, V = Moment.of(rows(0, seed=0)), rows(3, seed=9)
    assert none.count == 0 and torch.equal(none.gram, torch.zeros(D, D).double())
    assert torch.equal(none.times(V.T), torch.zeros(D, 3).double())
    assert none.energy(V) == none.mean_energy == 0
    torch.testing.assert_close(none.shifted_inverse(0.5)(V.T.double()), 2 * V.T.double())


def test_one_direction_alone():
    one = Moment.of(torch.full((3, 1), 2.0))
    assert not one.is_rows and one.mean_energy == 4 and one.energy(torch.ones(1, 1)) == 4


def test_few_vectors_of_a_wide_layer_never_become_a_square():
    """The sum of these vectors would take 320 GB."""
    d, n = 200_000, 5
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(0))
    moments = {name: Moment.of(x[i : i + 1]) for i, name in enumerate("abcde")}
    left = others_of("c", moments)
    assert left.data.shape == (4, d)
    V = x[:2].T.double()
    product = left.times(V)
    torch.testing.assert_close(left.energy(x[:2]), float((product * V).sum()))
    for shift in (2.0, float(d)):
        solution = left.shifted_inverse(shift)(V)
        # Sums of d products are rounded, and the largest eigenvalue over the shift magnifies that.
        bound = torch.finfo(V.dtype).eps * d**0.5 * (1 + d / (n - 1) / shift) * V.abs().max()
        assert (left.times(solution) + shift * solution - V).abs().max() < bound
    assert left.mean_energy == pytest.approx(1, rel=0.01)
