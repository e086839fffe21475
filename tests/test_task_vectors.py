"""LoRA pairs against float64 linear algebra; stacks, and what they refuse."""

import numpy as np
import pytest
import torch

from osrm.errors import UserError
from osrm.merging import merge
from osrm.task_vectors import LoraPair, TaskVectors

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def gaussian(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def orthonormal(rank, d, seed=0):
    return torch.linalg.qr(gaussian(d, rank, seed=seed).double()).Q.T.float()


def pair(seed=0, out=6, d=10, rank=3, dtype=torch.float32, scaling=2.0):
    return LoraPair(
        gaussian(rank, d, seed=seed, dtype=dtype),
        gaussian(out, rank, seed=seed + 100, dtype=dtype),
        scaling,
    )


def float64(tensor):
    return tensor.double().numpy()


def close(tensor, array, tolerance=1e-5):
    assert tensor.dtype == torch.float32
    np.testing.assert_allclose(float64(tensor), array, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scaling", [2.0, 0.5, -1.0])
def test_delta_is_scaling_B_A_in_float32(dtype, scaling):
    lora = pair(dtype=dtype, scaling=scaling)
    close(lora.delta, scaling * float64(lora.B) @ float64(lora.A))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scaling", [2.0, 0.5, -1.0])
def test_project_divides_by_scaling_and_uses_the_pseudo_inverse(dtype, scaling):
    delta, A = gaussian(6, 10, seed=1, dtype=dtype), gaussian(3, 10, seed=2, dtype=dtype)
    projected = LoraPair.project(delta, A, scaling)
    close(projected.B, float64(delta) @ np.linalg.pinv(float64(A)) / scaling)
    assert projected.A.equal(A.float()) and projected.scaling == scaling


@pytest.mark.parametrize("scaling", [2.0, 0.25])
def test_project_leaves_only_what_no_B_can_reach(scaling):
    delta, A = gaussian(6, 10, seed=1), gaussian(3, 10, seed=2)
    left = delta - LoraPair.project(delta, A, scaling).delta
    assert (left @ A.T).abs().max() < 1e-4
    for seed in range(20):
        other = LoraPair(A, gaussian(6, 3, seed=seed), scaling)
        assert (delta - other.delta).norm() >= left.norm()
    near = LoraPair.project(delta, A, scaling)
    for seed in range(20):
        nudged = LoraPair(A, near.B + 0.01 * gaussian(6, 3, seed=seed), scaling)
        assert (delta - nudged.delta).norm() > left.norm()


def test_project_onto_orthonormal_rows_is_the_transpose():
    delta, A = gaussian(6, 10, seed=1), orthonormal(3, 10)
    close(LoraPair.project(delta, A, 2.0).B, float64(delta) @ float64(A).T / 2)


@pytest.mark.parametrize("scaling", [2.0, 0.25])
def test_projecting_into_its_own_space_changes_nothing(scaling):
    lora = pair(scaling=4.0)
    again = LoraPair.project(lora.delta, lora.A, scaling)
    close(again.delta, float64(lora.delta))
    turned = orthonormal(3, 3) @ lora.A
    close(LoraPair.project(lora.delta, turned, scaling).delta, float64(lora.delta))


def test_projecting_twice_is_projecting_once():
    delta, A = gaussian(6, 10, seed=1), gaussian(3, 10, seed=2)
    once = LoraPair.project(delta, A, 2.0)
    close(LoraPair.project(once.delta, A, 2.0).B, float64(once.B))


def test_project_survives_repeated_rows():
    A = gaussian(2, 10, seed=2)[[0, 1, 1]]
    delta = gaussian(6, 10, seed=1)
    close(LoraPair.project(delta, A, 2.0).B, float64(delta) @ np.linalg.pinv(float64(A)) / 2)


def three_forms():
    """The same two modules as factors, as dense tensors, and as functions that fetch them."""
    factors = {"b.query": pair(0), "a.value": pair(1, out=4)}
    tensors = {name: lora.delta for name, lora in factors.items()}
    functions = {name: (lambda delta=delta: delta.clone()) for name, delta in tensors.items()}
    return {"rte": factors, "cola": tensors, "sst2": functions}


def test_stack_holds_all_tasks_updates():
    updates = three_forms()
    stack = TaskVectors.stack(updates)
    assert stack.tasks == ("rte", "cola", "sst2")
    assert list(stack) == ["a.value", "b.query"] and len(stack) == 2
    assert "a.value" in stack and "c" not in stack
    assert stack["a.value"].shape == (3, 4, 10)
    for name in stack:
        assert stack[name].dtype == torch.float32
        for row in stack[name]:
            assert row.equal(updates["rte"][name].delta)


def test_rows_follow_the_tasks_and_modules_are_sorted():
    updates = three_forms() | {"mnli": {"a.value": pair(7, out=4), "b.query": pair(8)}}
    turned = dict(reversed(updates.items()))
    assert TaskVectors.stack(turned).tasks == ("mnli", "sst2", "cola", "rte")
    assert list(TaskVectors.stack(turned)) == list(TaskVectors.stack(updates))
    for name in ("a.value", "b.query"):
        flipped = TaskVectors.stack(turned)[name].flip(0)
        assert flipped.equal(TaskVectors.stack(updates)[name])


def test_functions_are_called_at_each_look_up_alone():
    calls = []

    def read():
        calls.append(1)
        return torch.ones(2, 3)

    stack = TaskVectors.stack({"rte": {"w": read}})
    checked = len(calls)
    assert "w" in stack and list(stack) == ["w"] and len(calls) == checked
    assert stack["w"].equal(torch.ones(1, 2, 3)) and len(calls) == checked + 1


def test_half_precision_factors_stack_in_float32():
    lora = pair(dtype=torch.bfloat16)
    stack = TaskVectors.stack({"rte": {"w": lora}, "cola": {"w": lora.delta.half()}})
    assert stack["w"].dtype == torch.float32
    close(stack["w"][0], 2 * float64(lora.B) @ float64(lora.A))


def test_stack_carries_no_gradient():
    lora = pair()
    trained = LoraPair(torch.nn.Parameter(lora.A), torch.nn.Parameter(lora.B), lora.scaling)
    assert not TaskVectors.stack({"rte": {"w": trained}})["w"].requires_grad


def test_stack_does_not_alias_its_updates():
    dense = torch.ones(2, 3)
    stack = TaskVectors.stack({"rte": {"w": dense}})
    stack["w"].zero_()
    assert dense.eq(1).all() and stack["w"].eq(1).all()


def test_merging_factors_is_merging_their_dense_updates():
    stack = TaskVectors.stack(three_forms())
    merged = merge("average", stack)
    assert list(merged) == list(stack)
    for name in stack:
        torch.testing.assert_close(merged[name], stack[name])


def refused(tasks):
    with pytest.raises(UserError) as caught:
        TaskVectors.stack(tasks)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("tasks", [{}, {"rte": {}}, {"rte": {}, "cola": {}}])
def test_nothing_to_stack_is_refused(tasks):
    assert refused(tasks) == "nothing to stack: no task updates a module"


def test_a_module_that_a_task_lacks_has_a_zero_update_there():
    x, lora = torch.ones(2, 3), pair(out=2)
    stack = TaskVectors.stack({"rte": {"a": x, "b": lora}, "cola": {"a": x}, "sst2": {}})
    assert list(stack) == ["a", "b"]
    assert stack["a"].equal(torch.stack([x, x, 0 * x]))
    assert stack["b"][0].equal(lora.delta) and not stack["b"][1:].any()
    assert [each.shape for each in stack.pairs("b")] == [lora.shape] * 3


def test_factors_are_there_only_if_all_have_them():
    lora = pair(out=2)
    stack = TaskVectors.stack({"rte": {"w": lora}, "cola": {"w": lora.delta}})
    assert stack.pairs("w") == ()
    assert TaskVectors.stack({"rte": {"w": lora}}).pairs("w") == (lora,)


def test_factors_whose_product_overflows_are_refused():
    huge = LoraPair(torch.full((1, 2), 1e30), torch.full((2, 1), 1e30), 1.0)
    assert "NaN or infinity" in refused({"rte": {"w": huge}})


def test_long_lists_are_cut():
    many = {f"module {i}": torch.ones(1, 1) for i in range(100)}
    message = refused({"rte": {name: x * float("nan") for name, x in many.items()}})
    assert message.endswith("and 95 more") and len(message) < 500


def test_different_shapes_are_refused():
    assert refused({"rte": {"w": torch.ones(2, 3)}, "cola": {"w": pair(out=2)}}) == (
        "module 'w' is (2, 3) in task 'rte' but (2, 10) in task 'cola'"
    )
    assert "not a matrix but (3,)" in refused({"rte": {"bias": torch.ones(3)}})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("factor", ["A", "B", "dense", "function"])
def test_updates_that_are_not_finite_are_refused(factor, value):
    lora = pair()
    lora.B.zero_()
    bad = lora.delta
    bad[0, 0] = value
    if factor in "AB":
        getattr(lora, factor)[0, 0] = value
    update = {"A": lora, "B": lora, "dense": bad, "function": lambda: bad}[factor]
    assert refused({"rte": {"w": pair()}, "cola": {"w": update}}) == (
        "task 'cola', module 'w': the update holds NaN or infinity"
    )


def test_all_problems_are_reported_together():
    x = torch.ones(2, 2)
    message = refused({"rte": {"a": x, "b": x}, "cola": {"a": x[:1], "b": x / 0}})
    for part in ("module 'a' is (2, 2)", "task 'cola', module 'b'"):
        assert part in message
    assert message.count("; ") == 1
