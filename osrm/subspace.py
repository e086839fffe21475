"""The directions in which an update may live: those where the other tasks have no energy (Sec. 4).

Both subspaces belong to the smallest eigenvalues θ of P v = θ Q v. S is the second moment of the
other tasks, N that of the own task, δ a shift that makes S + δ I invertible.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from osrm.moments import Moment

# Columns of the Krylov block beyond the rank: they hold eigenvectors close to the last one wanted.
_GUARD = 8
# A value has converged if one more step changes it by less than this share of it.
_TOLERANCE = 1e-8
_EPS = torch.finfo(torch.float64).eps


def minor_subspace(others: Moment, rank: int, generator: Generator) -> Float[Tensor, "rank d"]:
    """A = argmin tr(A S Aᵀ) subject to A Aᵀ = I: the minor eigenvectors of the moment S.

    The minimum is the sum of the `rank` smallest eigenvalues. Many frames attain it if the last
    of these is a repeated eigenvalue, such as the zeros of few vectors' moment. Then the frame
    is drawn at random inside that eigenspace: a linear-algebra library would return the same
    vectors for every task, and the tasks would share them.

    Raises ValueError if rank is not in 1..d, or the moment is not finite. The generator is a CPU's.
    """
    return _lowest(others, rank, generator)


def contrastive_subspace(
    own: Moment, others: Moment, rank: int, generator: Generator, *, epsilon: float
) -> Float[Tensor, "rank d"]:
    """Of the directions with little energy of the others, those with most own energy.

    The top eigenvectors of N v = μ (S + ε · tr(S)/d · I) v, orthonormalised: those of largest
    ratio of own to other energy. ε says what "little" is, relative to the mean eigenvalue of S.
    ε → 0 gives the top own energy inside the others' null space, ε → ∞ the top own energy alone.
    If there are fewer own vectors than `rank`, no own energy is left for the remaining
    directions; they are those of least energy of the others.

    Raises ValueError as `minor_subspace`, or if epsilon is not above 0.
    """
    if not epsilon > 0:
        raise ValueError(f"epsilon {epsilon} is not above 0")
    A = _lowest(others, rank, generator, own=own, epsilon=epsilon)
    if len(A) == rank:
        return A
    # With more energy than any other direction, these are not among the minor ones.
    weight = (others.count * others.mean_energy * A.shape[1]) ** 0.5
    rest = minor_subspace(others + Moment.of(weight * A), rank - len(A), generator)
    return torch.linalg.qr(torch.cat([A, rest]).T)[0].T.contiguous()


def random_frame(d: int, rank: int, generator: Generator) -> Float[Tensor, "rank d"]:
    """Orthonormal rows, uniform over all frames (QR of a gaussian, signs fixed; Mezzadri 2007)."""
    q, r = torch.linalg.qr(torch.randn(d, rank, generator=generator, dtype=torch.float64))
    return (q * r.diagonal().sign()).T.contiguous()


def _lowest(
    others: Moment,
    rank: int,
    generator: Generator,
    *,
    own: Moment | None = None,
    epsilon: float = 0.0,
) -> Float[Tensor, "rank d"]:
    """Orthonormal rows that span the eigenvectors of the `rank` smallest θ of P v = θ Q v.

    P = S + δ I and Q = I; with `own` P = -N, since N may have no inverse, and Q = S + δ I. Then
    there are no more rows than own vectors. δ is at least the rounding of S's eigenvalues.

    Block Krylov iteration from a random block, with full orthogonalisation and a Rayleigh-Ritz
    step on the whole basis (Golub and Van Loan, 4th ed., Sec. 10.1 and 10.3), until the `rank`
    values no longer change; a basis of the whole space is exact in any case. The only cost of
    order d³ is one Cholesky factorisation, n × n if there are only n < d vectors.
    """
    d, device = others.data.shape[1], others.data.device
    if not 1 <= rank <= d:
        raise ValueError(f"rank {rank} is not in 1..{d}")
    moments = [others, own] if own else [others]
    if not all(moment.data.sum(dtype=torch.float64).isfinite() for moment in moments):
        raise ValueError("the moment holds NaN or infinity")
    trace = d * others.mean_energy or torch.finfo(torch.float64).tiny / _EPS
    shift = max(epsilon * trace / d, d * _EPS * trace)
    solve = others.shifted_inverse(shift)
    norm_P, norm_Q = (d * own.mean_energy, trace) if own else (trace, 1.0)  # upper bounds
    if own and own.is_rows and own.count:
        rank = min(rank, own.count)
    block = torch.randn(d, rank + _GUARD, generator=generator, dtype=torch.float64).to(device)
    basis, P, Q = block[:, :0], block[:0, :0], block[:0, :0]
    before = block.new_full((rank,), torch.inf)
    while True:
        block = block[:, : d - basis.shape[1]]
        for _ in range(2):  # twice is enough (Parlett, 1998, Sec. 6.9)
            block = torch.linalg.qr(block - basis @ (basis.T @ block))[0]
        basis = torch.cat([basis, block], 1)
        shifted = others.times(block) + shift * block
        following = own.times(block) if own else block
        # Not the inverse of S: its large values would hide, by rounding, how small ones differ.
        P_block, Q_block = (-following, shifted) if own else (shifted, block)
        P, Q = _grown(P, basis.T @ P_block), _grown(Q, basis.T @ Q_block)
        values, vectors = _generalised_eigh(P, Q)
        # First-order change of each value θ by rounding: vᵀ (δP - θ δQ) v with vᵀ Q v = 1.
        noise = d**0.5 * _EPS * vectors.square().sum(0) * (norm_P + values.abs() * norm_Q)
        change = (values[:rank] - before).abs() - _TOLERANCE * values[:rank].abs()
        if basis.shape[1] == d or (change <= noise[:rank]).all():
            break
        before, block = values[:rank], solve(following)
    last, vectors = values[rank - 1], basis @ vectors
    tied = (values - last).abs() <= noise
    fixed, free = vectors[:, (values < last) & ~tied], torch.linalg.qr(vectors[:, tied])[0]
    # A gaussian projected onto the eigenspace does not depend on the basis of it.
    gaussian = torch.randn(d, rank - fixed.shape[1], generator=generator, dtype=torch.float64)
    chosen = free @ (free.T @ gaussian.to(free))
    return torch.linalg.qr(torch.cat([fixed, chosen], 1))[0].T.contiguous()


def _grown(matrix: Float[Tensor, "n n"], columns: Float[Tensor, "m k"]) -> Float[Tensor, "m m"]:
    """The symmetric matrix of m = n + k rows with these last columns."""
    return torch.cat([torch.cat([matrix, columns[: len(matrix)]], 1), columns.T])


def _generalised_eigh(
    P: Float[Tensor, "n n"], Q: Float[Tensor, "n n"]
) -> tuple[Float[Tensor, "n"], Float[Tensor, "n n"]]:
    """P v = θ Q v, Q positive definite: values ascending, and vectors with vᵀ Q v = 1."""
    factor = torch.linalg.cholesky((Q + Q.T) / 2)
    half = torch.linalg.solve_triangular(factor, (P + P.T) / 2, upper=False)
    reduced = torch.linalg.solve_triangular(factor, half.T, upper=False)
    values, vectors = torch.linalg.eigh((reduced + reduced.T) / 2)
    return values, torch.linalg.solve_triangular(factor.T, vectors, upper=True)
