"""A attains the optimum that it is defined by, and where many do, it is a task's own choice."""

from functools import cache

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Generator, Tensor

from osrm.moments import Moment
from osrm.subspace import contrastive_subspace, minor_subspace, random_frame


def generator(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


@cache
def axes_of(d: int, seed: int) -> Tensor:
    return random_frame(d, d, generator(seed))


def moment_of(energies: list[float] | np.ndarray, seed: int = 0) -> Tensor:
    """A matrix with these eigenvalues, its eigenvectors in no special position."""
    axes = axes_of(len(energies), seed)
    moment = axes.T @ (torch.as_tensor(energies, dtype=torch.float64)[:, None] * axes)
    return (moment + moment.T) / 2


def statistic(moment: Tensor, count: int = 7) -> Moment:
    """A statistic of many vectors whose second moment is that matrix."""
    return Moment(count, count * moment)


def second_moment(rows: Tensor) -> Tensor:
    return rows.double().T @ rows.double() / len(rows)


def energy(A: Tensor, moment: Tensor) -> float:
    return float((A @ moment @ A.T).trace())


def rounding(energies: list[float] | np.ndarray) -> float:
    """An eigenvalue is known only up to the rounding of the largest one."""
    return len(energies) * np.finfo(np.float64).eps * float(np.sum(energies))


def cosines(first: Tensor, second: Tensor) -> np.ndarray:
    """Of the principal angles between two row spaces."""
    return np.cos(scipy.linalg.subspace_angles(first.T.numpy(), second.T.numpy()))


def assert_orthonormal(A: Tensor) -> None:
    torch.testing.assert_close(A @ A.T, torch.eye(len(A)).double(), rtol=0, atol=1e-12)


MOMENTS = {
    "ill-conditioned": moment_of(np.logspace(-8, 3, 24), seed=1),
    "two scales": moment_of([1e-6] * 3 + [1e-3] * 3 + list(np.linspace(1, 100, 18)), seed=2),
    "well-conditioned": moment_of(np.linspace(1, 2, 24), seed=3),
    "measured": second_moment(torch.randn(200, 24, generator=generator(4)) + 5),
}


# -- the least energy --------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 4, 8, 23, 24])
@pytest.mark.parametrize("name", MOMENTS)
def test_minimum_is_attained(name, rank):
    moment = MOMENTS[name]
    A = minor_subspace(statistic(moment), rank, generator())
    assert A.shape == (rank, 24)
    assert_orthonormal(A)
    energies = scipy.linalg.eigh(moment.numpy(), eigvals_only=True)
    least = energies[:rank].sum()
    assert energy(A, moment) == pytest.approx(least, rel=1e-6, abs=rounding(energies))


SPECTRA = {
    "k^-1.5": lambda d: np.arange(1.0, d + 1) ** -1.5,
    "k^-3": lambda d: np.arange(1.0, d + 1) ** -3,
    "exponential": lambda d: np.logspace(-8, 0, d),
    "linear": lambda d: np.arange(1.0, d + 1) / d,
    "flat": lambda d: np.linspace(1, 2, d),
    "one outlier": lambda d: np.append(np.linspace(1, 2, d - 1), 1e4),
    "three null": lambda d: np.append(np.zeros(3), np.linspace(1, 2, d - 3)),
    "half null": lambda d: np.append(np.zeros(d // 2), np.linspace(1, 2, d - d // 2)),
}


@pytest.mark.parametrize("d, rank", [(24, 3), (384, 1), (384, 8), (1024, 8)])
@pytest.mark.parametrize("name", SPECTRA)
def test_energy_is_the_sum_of_the_smallest_eigenvalues(name, d, rank, solves):
    """Whatever the spectrum; and far fewer steps than a basis of the whole space takes."""
    energies = np.sort(SPECTRA[name](d))
    moment = moment_of(energies)
    A = minor_subspace(statistic(moment), rank, generator(1))
    assert_orthonormal(A)
    least = energies[:rank].sum()
    assert energy(A, moment) == pytest.approx(least, rel=1e-6, abs=rounding(energies))
    assert len(solves) < (15 if name in ("exponential", "linear", "half null") else 40)


@pytest.fixture
def solves(monkeypatch):
    """The widths of all blocks that were solved with, one a step of the iteration."""
    found = []
    factorise = Moment.shifted_inverse

    def shifted_inverse(self, shift):
        solve = factorise(self, shift)
        return lambda x: found.append(x.shape[1]) or solve(x)

    monkeypatch.setattr(Moment, "shifted_inverse", shifted_inverse)
    return found


@pytest.mark.parametrize("name", MOMENTS)
def test_no_random_frame_does_better(name):
    moment = MOMENTS[name]
    best = energy(minor_subspace(statistic(moment), 5, generator()), moment)
    others = [energy(random_frame(24, 5, generator(seed)), moment) for seed in range(300)]
    assert best < min(others)


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e6, 1e30])
@pytest.mark.parametrize("count", [1, 7, 10**9])
def test_neither_units_nor_counts_matter(scale, count):
    moment = MOMENTS["two scales"]
    expected = minor_subspace(statistic(moment), 4, generator(2))
    found = minor_subspace(statistic(scale * moment, count), 4, generator(2))
    assert energy(found, moment) == pytest.approx(energy(expected, moment), rel=1e-9)


# -- few vectors -------------------------------------------------------------------------------


def few_vectors(seed: int, n: int = 7, d: int = 64) -> Tensor:
    """One mean vector for each of a few tasks: alike, as all text is alike to a model."""
    common = torch.randn(d, generator=generator(99))
    return 5 * common + torch.randn(n, d, generator=generator(seed))


def test_null_space_of_few_vectors():
    rows = few_vectors(seed=0)
    A = minor_subspace(Moment.of(rows), 8, generator())
    assert_orthonormal(A)
    moment = second_moment(rows)
    assert abs(energy(A, moment)) <= 1e-12 * float(moment.trace())


@pytest.mark.parametrize("n", [1, 5, 16, 40, 63])
def test_few_vectors_and_their_sum_give_the_same_energy(n):
    """Solved in the span of the vectors, or in the whole space; 60 of 64 leave only 4 nulls."""
    rows = few_vectors(seed=n, n=n) * torch.logspace(-2, 0, 64)
    moment = second_moment(rows)
    energies = scipy.linalg.eigh(moment.numpy(), eigvals_only=True)
    for rank in (1, 8, 64 - n, 64):
        frames = [
            minor_subspace(each, rank, generator(rank))
            for each in (Moment.of(rows), statistic(moment, n))
        ]
        least = energies[64 - n : rank].sum()  # before that: none at all
        for A in frames:
            assert_orthonormal(A)
            assert energy(A, moment) == pytest.approx(least, rel=1e-6, abs=rounding(energies))
        if rank in (64 - n, 64):  # nothing is free
            assert cosines(*frames).min() > 1 - 1e-10


def test_the_same_vector_many_times_is_one_direction():
    """Few vectors may be fewer directions still: their own matrix is singular then."""
    rows = few_vectors(seed=1, n=3)[[0, 0, 1, 0, 2, 1]]
    A = minor_subspace(Moment.of(rows), 61, generator())
    assert_orthonormal(A)
    assert energy(A, second_moment(rows)) <= 1e-12 * float(rows.square().sum())


def test_few_vectors_of_a_wide_layer_are_solved_with_in_their_span():
    """The square of this layer's width would take 320 GB."""
    rows = torch.randn(5, 200_000, generator=generator(0))
    A = minor_subspace(Moment.of(rows), 4, generator(1))
    assert_orthonormal(A)
    assert (A @ rows.double().T).abs().max() < 1e-10


# -- what is free is a choice ------------------------------------------------------------------


def test_tasks_do_not_meet_in_an_arbitrary_corner_of_the_null_space():
    H1, H2 = few_vectors(seed=1, d=256), few_vectors(seed=2, d=256)
    S1, S2 = Moment.of(H1), Moment.of(H2)
    A1 = minor_subspace(S1, 8, generator(1))
    assert np.median(cosines(A1, minor_subspace(S2, 8, generator(2)))) < 0.5
    # The same statistic, too, leaves each task a frame of its own.
    assert np.median(cosines(A1, minor_subspace(S1, 8, generator(2)))) < 0.5
    # The release takes the last right singular vectors, and LAPACK completes a basis in the same
    # way every time: with the last coordinates.
    R1, R2 = (torch.from_numpy(np.linalg.svd(H.double().numpy())[2][-8:]) for H in (H1, H2))
    assert np.median(cosines(R1, R2)) > 0.9


@pytest.mark.parametrize("d", [8, 24])
@pytest.mark.parametrize("form", ["vectors", "sum"])
def test_choice_is_uniform_in_the_null_space(form, d):
    """Every direction of it is met equally often: the mean projector is rank/dimension."""
    rows = torch.randn(3, d, generator=generator(5))
    total = Moment.of(rows) if form == "vectors" else statistic(second_moment(rows))
    frames = torch.stack([minor_subspace(total, 2, generator(seed)) for seed in range(400)])
    mean = (frames.mT @ frames).mean(0)
    null = torch.from_numpy(scipy.linalg.null_space(rows.double().numpy()))
    expected = 2 / (d - 3) * null @ null.T
    torch.testing.assert_close(mean, expected, rtol=0, atol=0.05)


FORMS = {
    "few vectors": Moment.of(few_vectors(seed=3)),
    "their sum": statistic(second_moment(few_vectors(seed=3))),
    "no null": statistic(moment_of(np.logspace(-8, 0, 64))),
}


@pytest.mark.parametrize("form", FORMS)
def test_same_seed_same_frame_bit_for_bit(form):
    minor = [minor_subspace(FORMS[form], 8, generator(seed)) for seed in (6, 6, 7)]
    own = Moment.of(few_vectors(seed=4, n=80))
    both = [
        contrastive_subspace(own, FORMS[form], 8, generator(seed), epsilon=0.1)
        for seed in (6, 6, 7)
    ]
    for first, second, other in (minor, both):
        assert torch.equal(first, second)
        assert not torch.equal(first, other)


def test_part_is_fixed_and_part_is_free():
    """Three nulls and two of the four directions of energy 1: only the two are a choice."""
    moment = moment_of([0, 0, 0, 1, 1, 1, 1, 2, 3, 4], seed=8)
    vectors = torch.from_numpy(scipy.linalg.eigh(moment.numpy())[1])
    null, repeated = vectors[:, :3], vectors[:, 3:7]
    first, second = (minor_subspace(statistic(moment), 5, generator(seed)) for seed in (0, 1))
    for A in (first, second):
        assert_orthonormal(A)
        assert energy(A, moment) == pytest.approx(2, rel=1e-12)
        torch.testing.assert_close(A[:3].T @ A[:3], null @ null.T, rtol=0, atol=1e-10)
        assert torch.linalg.norm(A[3:] @ repeated).square() == pytest.approx(2, rel=1e-10)
    assert cosines(first[:3], second[:3]).min() > 1 - 1e-10
    assert cosines(first[3:], second[3:]).min() < 0.99


def test_fewer_nulls_than_rank():
    moment = moment_of([0, 0, 0, 1, 2, 3, 4, 5], seed=9)
    first, second = (minor_subspace(statistic(moment), 5, generator(seed)) for seed in (0, 1))
    assert energy(first, moment) == pytest.approx(0 + 1 + 2, rel=1e-10)
    assert cosines(first, second).min() > 1 - 1e-10, "nothing but signs is free here"


@pytest.mark.parametrize("d", [32, 200])
def test_isotropic_moment_leaves_everything_free(d):
    moment = Moment(1, torch.eye(d).double())
    first, second = (minor_subspace(moment, 4, generator(seed)) for seed in (0, 1))
    assert_orthonormal(first)
    assert np.median(cosines(first, second)) < 0.7
    assert (first.abs() > 1e-6).all(), "not the coordinate axes"


NOTHING = {
    "no vectors": Moment.of(torch.zeros(0, 32)),
    "zero vectors": Moment.of(torch.zeros(3, 32)),
    "zero sum": Moment(40, torch.zeros(32, 32).double()),
}


@pytest.mark.parametrize("rank", [6, 32])
@pytest.mark.parametrize("nothing", NOTHING.values(), ids=NOTHING)
def test_no_energy_at_all(nothing, rank):
    """Nothing to avoid, nothing to look for: any frame, but one of one's own."""
    some = Moment.of(torch.randn(50, 32, generator=generator(1)))
    for draw in (
        lambda seed: minor_subspace(nothing, rank, generator(seed)),
        lambda seed: contrastive_subspace(nothing, nothing, rank, generator(seed), epsilon=0.1),
        lambda seed: contrastive_subspace(nothing, some, rank, generator(seed), epsilon=0.1),
        lambda seed: contrastive_subspace(some, nothing, rank, generator(seed), epsilon=0.1),
    ):
        assert_orthonormal(draw(0))
        assert not torch.equal(draw(0), draw(1))


# -- most own energy against that of the others ------------------------------------------------


def shifted(others: Tensor, epsilon: float) -> Tensor:
    """S_others + ε tr(S_others)/d I."""
    return others + epsilon * others.trace() / len(others) * torch.eye(len(others))


def ratio(A: Tensor, own: Tensor, others: Tensor, epsilon: float) -> float:
    """tr((A (S_others + ...) Aᵀ)⁻¹ A S_own Aᵀ): it does not depend on the basis of the rows."""
    below = A @ shifted(others, epsilon) @ A.T
    return float(torch.linalg.solve(below, A @ own @ A.T).trace())


def top(own: Tensor, others: Tensor, epsilon: float, rank: int) -> tuple[np.ndarray, Tensor]:
    """scipy's generalised eigenvalues, descending, and the vectors of the first ones as rows."""
    values, vectors = scipy.linalg.eigh(own.numpy(), shifted(others, epsilon).numpy())
    return values[::-1], torch.from_numpy(vectors[:, ::-1][:, :rank].copy()).T


PAIRS = {
    "powers": (SPECTRA["k^-1.5"], SPECTRA["k^-1.5"]),
    "exponentials": (lambda d: np.logspace(-6, 0, d), SPECTRA["exponential"]),
    "flat others": (SPECTRA["linear"], SPECTRA["flat"]),
    "flat own": (SPECTRA["flat"], SPECTRA["linear"]),
    "outliers": (SPECTRA["one outlier"], SPECTRA["one outlier"]),
    "others half null": (SPECTRA["linear"], SPECTRA["half null"]),
    "own half null": (SPECTRA["half null"], SPECTRA["k^-1.5"]),
}


@pytest.mark.parametrize("d, rank", [(24, 1), (24, 4), (384, 4)])
@pytest.mark.parametrize("epsilon", [1e-6, 1e-2, 1.0, 100.0])
@pytest.mark.parametrize("name", PAIRS)
def test_contrastive_is_the_top_of_the_generalised_eigenproblem(name, epsilon, d, rank):
    own, others = (moment_of(np.sort(each(d)), seed) for seed, each in enumerate(PAIRS[name]))
    moments = statistic(own), statistic(others, 9)
    A = contrastive_subspace(*moments, rank, generator(), epsilon=epsilon)
    assert A.shape == (rank, d)
    assert_orthonormal(A)
    values, vectors = top(own, others, epsilon, rank)
    assert ratio(A, own, others, epsilon) == pytest.approx(values[:rank].sum(), rel=1e-7)
    gap = 1 - values[rank] / values[rank - 1]  # a small one leaves the border to rounding
    assert cosines(A, vectors).min() > 1 - max(1e-8, 1e-10 / gap)


@pytest.mark.parametrize("epsilon", [1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("name", PAIRS)
def test_no_random_frame_has_a_larger_ratio(name, epsilon):
    own, others = (moment_of(np.sort(each(24)), seed) for seed, each in enumerate(PAIRS[name]))
    A = contrastive_subspace(statistic(own), statistic(others), 5, generator(), epsilon=epsilon)
    best = ratio(A, own, others, epsilon)
    near = [A + 1e-3 * random_frame(24, 5, generator(seed)) for seed in range(100)]
    far = [random_frame(24, 5, generator(seed)) for seed in range(200)]
    assert best > max(ratio(each, own, others, epsilon) for each in near + far)


def test_own_and_others_are_not_alike():
    """One direction each: the own one is taken, the others' is left."""
    own, others = (moment_of([0.0] * 23 + [1.0], seed) for seed in (0, 1))
    A = contrastive_subspace(statistic(own), statistic(others), 1, generator(), epsilon=1e-3)
    assert energy(A, own) > 100 * energy(A, others)


def test_a_huge_epsilon_leaves_the_principal_components_of_the_own_features():
    own, others = moment_of(SPECTRA["linear"](24), 0), moment_of(SPECTRA["one outlier"](24), 1)
    A = contrastive_subspace(statistic(own), statistic(others), 4, generator(), epsilon=1e9)
    principal = torch.from_numpy(scipy.linalg.eigh(own.numpy())[1][:, -4:].copy()).T
    assert cosines(A, principal).min() > 1 - 1e-8


@pytest.mark.parametrize("form", ["vectors", "sum"])
def test_a_tiny_epsilon_leaves_the_top_own_energy_in_the_null_space_of_the_others(form):
    rows = torch.randn(14, 24, generator=generator(3))
    others = Moment.of(rows) if form == "vectors" else statistic(second_moment(rows))
    own = moment_of(SPECTRA["linear"](24))
    A = contrastive_subspace(statistic(own), others, 4, generator(), epsilon=1e-8)
    null = torch.from_numpy(scipy.linalg.null_space(rows.double().numpy()).copy())
    inside = scipy.linalg.eigh((null.T @ own @ null).numpy())[1][:, -4:].copy()
    assert energy(A, second_moment(rows)) < 1e-12 * others.mean_energy
    assert cosines(A, (null @ torch.from_numpy(inside)).T).min() > 1 - 1e-8


def test_against_isotropic_others_it_is_the_principal_components():
    own = moment_of(SPECTRA["k^-1.5"](48))
    isotropic = Moment(1, torch.eye(48).double())
    A = contrastive_subspace(statistic(own), isotropic, 4, generator(), epsilon=0.1)
    assert energy(A, own) == pytest.approx(float(SPECTRA["k^-1.5"](48)[:4].sum()), rel=1e-9)


def test_isotropic_own_features_leave_the_least_energy_of_the_others():
    others = statistic(moment_of(SPECTRA["linear"](48)))
    own = Moment(1, torch.eye(48).double())
    A = contrastive_subspace(own, others, 4, generator(), epsilon=0.1)
    assert cosines(A, minor_subspace(others, 4, generator(1))).min() > 1 - 1e-8


@pytest.mark.parametrize("d", [32, 200])
def test_isotropic_own_and_others_leave_everything_free(d):
    same = Moment(1, torch.eye(d).double())
    first, second = (contrastive_subspace(same, same, 4, generator(s), epsilon=0.1) for s in (0, 1))
    assert_orthonormal(first)
    assert np.median(cosines(first, second)) < 0.7


@pytest.mark.parametrize("n", [1, 3, 7])
@pytest.mark.parametrize("form", ["vectors", "sum"])
def test_fewer_own_vectors_than_rank(n, form):
    """Their n optimal directions are in it, all own energy over them.

    Beside them it has those of least energy of the others, if the own vectors come as such.
    """
    rows, other_rows = few_vectors(seed=0, n=n), few_vectors(seed=1, n=100)
    own = Moment.of(rows) if form == "vectors" else statistic(second_moment(rows))
    others = Moment.of(other_rows)
    A = contrastive_subspace(own, others, 8, generator(), epsilon=1e-2)
    assert_orthonormal(A)
    _, vectors = top(second_moment(rows), second_moment(other_rows), 1e-2, n)
    assert cosines(A, vectors).min() > 1 - 1e-8
    if form == "vectors":
        left = torch.from_numpy(scipy.linalg.null_space(vectors.numpy()))
        least = scipy.linalg.eigvalsh((left.T @ second_moment(other_rows) @ left).numpy())
        rest = torch.from_numpy(scipy.linalg.null_space(vectors.numpy() @ A.numpy().T)).T @ A
        assert energy(rest, second_moment(other_rows)) == pytest.approx(
            least[: 8 - n].sum(), rel=1e-6
        )


@pytest.mark.parametrize("few", ["own", "others", "both"])
def test_contrastive_of_few_vectors_and_of_their_sums(few):
    own = few_vectors(seed=0, n=20 if few in ("own", "both") else 90)
    others = few_vectors(seed=1, n=30 if few in ("others", "both") else 90)
    A = contrastive_subspace(Moment.of(own), Moment.of(others), 4, generator(), epsilon=1e-2)
    _, vectors = top(second_moment(own), second_moment(others), 1e-2, 4)
    assert cosines(A, vectors).min() > 1 - 1e-8


@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1e6])
def test_the_ratio_knows_no_units(scale):
    own, others = moment_of(SPECTRA["linear"](24), 0), moment_of(SPECTRA["k^-1.5"](24), 1)
    A = contrastive_subspace(statistic(own), statistic(others), 4, generator(), epsilon=1e-2)
    for each in ((own * scale, others), (own, others * scale)):
        scaled = contrastive_subspace(*map(statistic, each), 4, generator(), epsilon=1e-2)
        assert cosines(A, scaled).min() > 1 - 1e-10


# -- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [0.0, -1e-3, float("nan")])
def test_epsilon_that_is_not_above_zero(epsilon):
    moment = Moment(1, torch.eye(4).double())
    with pytest.raises(ValueError, match=r"epsilon .* is not above 0"):
        contrastive_subspace(moment, moment, 2, generator(), epsilon=epsilon)


@pytest.mark.parametrize("rank", [0, -1, 5])
def test_rank_outside_the_layer(rank):
    for moment in (Moment(9, torch.eye(4).double()), Moment.of(torch.ones(2, 4))):
        with pytest.raises(ValueError, match=rf"rank {rank} is not in 1\.\.4"):
            minor_subspace(moment, rank, generator())
        with pytest.raises(ValueError, match=rf"rank {rank} is not in 1\.\.4"):
            contrastive_subspace(moment, moment, rank, generator(), epsilon=0.1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("n", [2, 9])
def test_moment_that_is_not_finite(value, n):
    good, rows = Moment.of(torch.ones(n, 4)), torch.ones(n, 4)
    rows[1, 2] = value
    bad = Moment.of(rows)
    with pytest.raises(ValueError, match="NaN or infinity"):
        minor_subspace(bad, 2, generator())
    for own, others in ((bad, good), (good, bad)):
        with pytest.raises(ValueError, match="NaN or infinity"):
            contrastive_subspace(own, others, 2, generator(), epsilon=0.1)


# -- frames without a preference ---------------------------------------------------------------


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
