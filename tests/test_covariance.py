"""Sufficient statistics add: however the rows are split, the result is that of all of them."""

import numpy as np
import pytest
import torch

from osrm.covariance import Covariance

D = 6


def rows(n: int, seed: int, offset: float = 3.0) -> torch.Tensor:
    """Correlated rows far from the origin."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(D, D, generator=generator, dtype=torch.float64)
    return torch.randn(n, D, generator=generator, dtype=torch.float64) @ mixing + offset


def assert_same(found: Covariance, expected: Covariance) -> None:
    assert found.count == expected.count
    torch.testing.assert_close(found.mean, expected.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.scatter, expected.scatter, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("first, second", [(5, 9), (1, 1), (1, 40), (0, 4), (4, 0), (0, 0)])
def test_statistics_of_two_parts_add_up(first, second):
    x = rows(first + second, seed=first)
    parts = Covariance.of(x[:first]) + Covariance.of(x[first:])
    assert_same(parts, Covariance.of(x))


@pytest.mark.parametrize("n", [1, 2, 50])
def test_against_numpy(n):
    x = rows(n, seed=n)
    statistic, array = Covariance.of(x), x.numpy()
    assert statistic.count == n
    np.testing.assert_allclose(statistic.mean, array.mean(0), rtol=1e-12)
    np.testing.assert_allclose(statistic.moment, array.T @ array / n, rtol=1e-12)
    centred = np.cov(array.T, bias=True) if n > 1 else np.zeros((D, D))
    np.testing.assert_allclose(statistic.scatter / n, centred, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_neither_the_split_nor_the_order_of_batches_matters(seed):
    x = rows(64, seed=7)
    generator = torch.Generator().manual_seed(seed)
    cuts = sorted(torch.randint(0, 65, (9,), generator=generator).tolist())  # some are empty
    batches = [x[a:b] for a, b in zip([0, *cuts], [*cuts, 64])]
    total = Covariance.of(x[:0])
    for i in torch.randperm(len(batches), generator=generator):
        total = total + Covariance.of(batches[i])
    assert_same(total, Covariance.of(x))


def test_no_rows_have_no_energy():
    assert torch.equal(Covariance.of(rows(0, seed=0)).moment, torch.zeros(D, D).double())


def test_float32_rows_are_summed_in_float64():
    x = rows(1000, seed=1, offset=1e4).float()
    found = sum((Covariance.of(batch) for batch in x.split(16)), Covariance.of(x[:0]))
    array = x.numpy().astype(np.float64)
    assert found.moment.dtype == torch.float64
    centred = array - array.mean(0)
    np.testing.assert_allclose(found.scatter, centred.T @ centred, rtol=1e-9)
