"""OSRM's A attains the minimum, and where many do, it is a choice of each task's own."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Generator, Tensor

from osrm.covariance import Covariance
from osrm.subspace import minor_subspace, random_frame


def generator(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def moment_of(energies: list[float] | np.ndarray, seed: int = 0) -> Tensor:
    """A moment with these eigenvalues, its eigenvectors in no special position."""
    axes = random_frame(len(energies), len(energies), generator(seed))
    moment = axes.T @ torch.diag(torch.as_tensor(energies, dtype=torch.float64)) @ axes
    return (moment + moment.T) / 2


def energy(A: Tensor, moment: Tensor) -> float:
    return float((A @ moment @ A.T).trace())


def cosines(first: Tensor, second: Tensor) -> np.ndarray:
    """Of the principal angles between two row spaces."""
    return np.cos(scipy.linalg.subspace_angles(first.T.numpy(), second.T.numpy()))


def assert_orthonormal(A: Tensor) -> None:
    torch.testing.assert_close(A @ A.T, torch.eye(len(A)).double(), rtol=0, atol=1e-12)


MOMENTS = {
    "ill-conditioned": moment_of(np.logspace(-8, 3, 24), seed=1),
    "two scales": moment_of([1e-6] * 3 + [1e-3] * 3 + list(np.linspace(1, 100, 18)), seed=2),
    "well-conditioned": moment_of(np.linspace(1, 2, 24), seed=3),
    "measured": Covariance.of(torch.randn(200, 24, generator=generator(4)) + 5).moment,
}


@pytest.mark.parametrize("rank", [1, 4, 8, 23, 24])
@pytest.mark.parametrize("name", MOMENTS)
def test_minimum_is_attained(name, rank):
    moment = MOMENTS[name]
    A = minor_subspace(moment, rank, generator())
    assert A.shape == (rank, 24)
    assert_orthonormal(A)
    least = scipy.linalg.eigh(moment.numpy(), eigvals_only=True)[:rank].sum()
    # eigh itself knows an eigenvalue only up to the rounding of the largest one.
    rounding = 24 * np.finfo(np.float64).eps * float(moment.trace())
    assert energy(A, moment) == pytest.approx(least, rel=1e-6, abs=rounding)


@pytest.mark.parametrize("name", MOMENTS)
def test_no_random_frame_does_better(name):
    moment = MOMENTS[name]
    best = energy(minor_subspace(moment, 5, generator()), moment)
    others = [energy(random_frame(24, 5, generator(seed)), moment) for seed in range(300)]
    assert best < min(others)


def few_vectors(seed: int, n: int = 7, d: int = 64) -> Tensor:
    """One mean vector for each of a few tasks: alike, as all text is alike to a model."""
    common = torch.randn(d, generator=generator(99), dtype=torch.float64)
    return 5 * common + torch.randn(n, d, generator=generator(seed), dtype=torch.float64)


def test_null_space_of_few_vectors():
    moment = Covariance.of(few_vectors(seed=0)).moment
    A = minor_subspace(moment, 8, generator())
    assert_orthonormal(A)
    assert abs(energy(A, moment)) <= 1e-12 * float(moment.trace())


def test_tasks_do_not_meet_in_an_arbitrary_corner_of_the_null_space():
    H1, H2 = few_vectors(seed=1, d=256), few_vectors(seed=2, d=256)
    S1, S2 = Covariance.of(H1).moment, Covariance.of(H2).moment
    A1 = minor_subspace(S1, 8, generator(1))
    assert np.median(cosines(A1, minor_subspace(S2, 8, generator(2)))) < 0.5
    # The same statistic, too, leaves each task a frame of its own.
    assert np.median(cosines(A1, minor_subspace(S1, 8, generator(2)))) < 0.5
    # The release takes the last right singular vectors, and LAPACK completes a basis in the same
    # way every time: with the last coordinates.
    R1, R2 = (torch.from_numpy(np.linalg.svd(H)[2][-8:]) for H in (H1.numpy(), H2.numpy()))
    assert np.median(cosines(R1, R2)) > 0.9


def test_choice_is_uniform_in_the_null_space():
    """Every direction of it is met equally often: the mean projector is rank/dimension."""
    moment = moment_of([0.0] * 5 + [1.0, 2.0, 3.0], seed=5)
    frames = [minor_subspace(moment, 2, generator(seed)) for seed in range(1500)]
    mean = torch.stack([A.T @ A for A in frames]).mean(0)
    null = torch.from_numpy(scipy.linalg.eigh(moment.numpy())[1][:, :5])
    torch.testing.assert_close(mean, 0.4 * null @ null.T, rtol=0, atol=0.04)


def test_same_seed_same_frame_bit_for_bit():
    moment = Covariance.of(few_vectors(seed=3)).moment
    first, second, other = (minor_subspace(moment, 8, generator(seed)) for seed in (6, 6, 7))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_part_is_fixed_and_part_is_free():
    """Three nulls and two of the four directions of energy 1: only the two are a choice."""
    moment = moment_of([0, 0, 0, 1, 1, 1, 1, 2, 3, 4], seed=8)
    vectors = torch.from_numpy(scipy.linalg.eigh(moment.numpy())[1])
    null, repeated = vectors[:, :3], vectors[:, 3:7]
    first, second = (minor_subspace(moment, 5, generator(seed)) for seed in (0, 1))
    for A in (first, second):
        assert_orthonormal(A)
        assert energy(A, moment) == pytest.approx(2, rel=1e-12)
        torch.testing.assert_close(A[:3].T @ A[:3], null @ null.T, rtol=0, atol=1e-10)
        assert torch.linalg.norm(A[3:] @ repeated).square() == pytest.approx(2, rel=1e-10)
    assert cosines(first[:3], second[:3]).min() > 1 - 1e-10
    assert cosines(first[3:], second[3:]).min() < 0.99


def test_fewer_nulls_than_rank():
    moment = moment_of([0, 0, 0, 1, 2, 3, 4, 5], seed=9)
    first, second = (minor_subspace(moment, 5, generator(seed)) for seed in (0, 1))
    assert energy(first, moment) == pytest.approx(0 + 1 + 2, rel=1e-10)
    assert cosines(first, second).min() > 1 - 1e-10, "nothing but signs is free here"


def test_isotropic_moment_leaves_everything_free():
    first, second = (minor_subspace(torch.eye(32), 4, generator(seed)) for seed in (0, 1))
    assert_orthonormal(first)
    assert np.median(cosines(first, second)) < 0.7
    assert (first.abs() > 1e-6).all(), "not the coordinate axes"


def test_no_energy_at_all():
    assert_orthonormal(minor_subspace(torch.zeros(6, 6), 6, generator()))


@pytest.mark.parametrize("rank", [0, -1, 5])
def test_rank_outside_the_layer(rank):
    with pytest.raises(ValueError, match=rf"rank {rank} is not in 1\.\.4"):
        minor_subspace(torch.eye(4), rank, generator())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_moment_that_is_not_finite(value):
    moment = torch.eye(4)
    moment[1, 2] = value
    with pytest.raises(ValueError, match="NaN or infinity"):
        minor_subspace(moment, 2, generator())


@pytest.mark.parametrize("d, rank", [(1, 1), (5, 1), (5, 3), (5, 5)])
def test_random_frame(d, rank):
    frame = random_frame(d, rank, generator(3))
    assert frame.shape == (rank, d)
    assert_orthonormal(frame)
    assert torch.equal(frame, random_frame(d, rank, generator(3)))
    # Uniform over all frames: no direction is preferred, nor a sign (as QR's own signs would).
    frames = torch.stack([random_frame(d, rank, generator(seed)) for seed in range(800)])
    torch.testing.assert_close(frames.mean(0), torch.zeros(rank, d).double(), rtol=0, atol=0.15)
    projector = (frames.mT @ frames).mean(0)
    torch.testing.assert_close(projector, rank / d * torch.eye(d).double(), rtol=0, atol=0.08)
