"""The least-squares problem of --align-heads, against numpy."""

import numpy as np
import pytest
import torch

from osrm.alignment import head_change


def drawn(n: int, d: int = 7, out: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A head's layer V, own features, and those of a merge: an affine map of them and noise."""
    generator = torch.Generator().manual_seed(n)
    V, own, map_, noise = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((out, d), (n, d), (d, d), (n, d))
    )
    return V, own, own @ map_ + 0.3 * noise + 2


@pytest.mark.parametrize("n", [2, 5, 40])
@pytest.mark.parametrize("bias", [True, False])
def test_it_solves_the_ridge_problem(n, bias):
    """Pseudo-examples √τ e_j with target 0, the constant column without a penalty."""
    V, own, merged = drawn(n)
    delta, constant = head_change(V, own, merged, bias)
    X, Y = merged.numpy(), ((own - merged) @ V.T).numpy()
    d = X.shape[1]
    tau = ((X - X.mean(0) * bias) ** 2).sum() / n
    rows = np.vstack([X, np.sqrt(tau) * np.eye(d)])
    ones = np.concatenate([np.full(n, float(bias)), np.zeros(d)])[:, None]
    targets = np.vstack([Y, np.zeros((d, len(V)))])
    solution = np.linalg.lstsq(np.hstack([rows, ones]), targets, rcond=None)[0]
    np.testing.assert_allclose(delta.T.numpy(), solution[:d], atol=1e-10)
    np.testing.assert_allclose(constant.numpy(), solution[d] * bias, atol=1e-10)


def test_many_examples_undo_an_affine_change_of_the_features():
    V, own, _ = drawn(3_000)
    map_ = torch.eye(7, dtype=torch.float64) + 0.3 * drawn(7)[1]
    merged = own @ map_ + 5
    delta, constant = head_change(V, own, merged)
    before = (merged @ V.T - own @ V.T).square().mean()
    after = (merged @ (V + delta).T + constant - own @ V.T).square().mean()
    assert after < 1e-4 * before


def test_features_that_did_not_change_leave_the_head_as_it_is():
    V, own, _ = drawn(20)
    for bias in (True, False):
        delta, constant = head_change(V, own, own.clone(), bias)
        assert not delta.any() and not constant.any()


def test_features_that_are_all_equal_change_the_bias_alone():
    V, own, merged = drawn(4)
    delta, constant = head_change(V, own[:1].expand(4, 7), merged[:1].expand(4, 7))
    torch.testing.assert_close(delta, torch.zeros_like(V), atol=1e-12, rtol=0)
    torch.testing.assert_close(constant, V @ (own[0] - merged[0]))
