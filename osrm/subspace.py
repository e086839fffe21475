"""Which subspace may an update live in? OSRM, Sec. 4: the one where other tasks have no energy.

Every answer is the top of one generalised eigenproblem, N v = μ (S + shift I) v, S being the moment
of the other tasks: N = I gives OSRM's minor subspace, N = the own moment the contrastive one.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from osrm.moments import Moment

# Columns of the Krylov block beyond the rank: they catch what lies close behind the border.
_GUARD = 8
# A value has converged if one more step changes it by less than this share of it.
_TOLERANCE = 1e-8


def minor_subspace(others: Moment, rank: int, generator: Generator) -> Float[Tensor, "rank d"]:
    """A = argmin tr(A S Aᵀ) subject to A Aᵀ = I: the minor eigenvectors of the moment S.

    The minimum is the sum of the `rank` smallest eigenvalues. Where it is attained by many
    frames (the eigenvalue at the border is repeated: above all the null space of a statistic of
    few vectors) the frame is drawn from `generator` inside that eigenspace, no direction of it
    being preferred. A linear-algebra library would return the same arbitrary vectors for every
    task instead, and the tasks would meet in them.

    Args:
        others: the statistic of the other tasks' features.
        rank: number of directions, 1 <= rank <= d.
        generator: a CPU generator, of the random start of the iteration and of free choices.

    Raises:
        ValueError: rank is not in 1..d, or the moment is not finite.
    """
    return _pencil_top(None, others, 0.0, rank, generator)


def contrastive_subspace(
    own: Moment, others: Moment, rank: int, generator: Generator, epsilon: float
) -> Float[Tensor, "rank d"]:
    """Among directions of little energy of the others, those of most own energy.

    The top generalised eigenvectors of (S_own, S_others + ε · tr(S_others)/d · I), that is of
    largest ratio of own to other energy, orthonormalised. ε says what "little" is, relative to
    the mean eigenvalue of the others: with ε → 0 it is the top own energy inside the others'
    null space, with ε → ∞ the top own energy alone. Fewer own vectors than `rank` fill as many
    directions; the rest, where there is no own energy, are those of least energy of the others.

    Raises:
        ValueError: as `minor_subspace`; epsilon is not above 0.
    """
    if not epsilon > 0:
        raise ValueError(f"epsilon {epsilon} is not above 0")
    few = own.is_rows and 0 < own.count < rank <= own.data.shape[1]
    A = _pencil_top(own, others, epsilon, own.count if few else rank, generator)
    if not few:
        return A
    # The directions found get more energy than any other has.
    weight = (others.count * others.mean_energy * A.shape[1]) ** 0.5
    rest = minor_subspace(others + Moment.of(weight * A), rank - len(A), generator)
    return torch.linalg.qr(torch.cat([A, rest]).T)[0].T.contiguous()


def random_frame(d: int, rank: int, generator: Generator) -> Float[Tensor, "rank d"]:
    """Orthonormal rows, uniform over all frames (QR of a gaussian, signs fixed; Mezzadri 2007)."""
    gaussian = torch.randn(d, rank, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    return (q * r.diagonal().sign()).T.contiguous()


def _pencil_top(
    own: Moment | None, others: Moment, epsilon: float, rank: int, generator: Generator
) -> Float[Tensor, "rank d"]:
    """Orthonormal rows that span the top of N v = μ (S + shift I) v; N = I if `own` is None.

    Block Krylov iteration of (S + shift I)⁻¹ N from a random block, with full orthogonalisation
    and a Rayleigh-Ritz step on the whole basis (Golub and Van Loan, 4th ed., Sec. 10.1 and 10.3),
    until the top `rank` values stand still; a basis of the whole space is exact in any case. The
    only cost of order d³ is one Cholesky factorisation, n × n if there are but n < d vectors.

    Of N = I the small 1/μ are found, not the large μ, since the rounding of a null space's μ would
    hide all others; of an own moment the small -μ, since it may have no inverse.
    """
    d = others.data.shape[1]
    if not 1 <= rank <= d:
        raise ValueError(f"rank {rank} is not in 1..{d}")
    if not all(each.data.sum(dtype=torch.float64).isfinite() for each in (others, own) if each):
        raise ValueError("the moment holds NaN or infinity")
    eps = torch.finfo(torch.float64).eps
    trace = d * others.mean_energy or torch.finfo(torch.float64).tiny / eps
    # At least the rounding of the eigenvalues, or there is no factorisation.
    shift = max(epsilon * trace / d, d * eps * trace)
    solve = others.shifted_inverse(shift)
    block = torch.randn(d, rank + _GUARD, generator=generator, dtype=torch.float64)
    block = block.to(others.data.device)
    basis = block[:, :0]
    left = right = block[:0, :0]
    before = block.new_full((rank,), torch.inf)
    while True:
        block = _orthonormal(block[:, : d - basis.shape[1]], basis)
        basis = torch.cat([basis, block], 1)
        image = own.times(block) if own else block
        shifted = others.times(block) + shift * block
        left = _grown(left, basis.T @ (-image if own else shifted))
        right = _grown(right, basis.T @ (shifted if own else block))
        values, vectors = _generalised_eigh(left, right)
        # First-order change of each value θ by rounding: vᵀ (δP - θ δQ) v with vᵀ Q v = 1.
        size, unit = (d * own.mean_energy, trace) if own else (trace, 1.0)
        noise = d**0.5 * eps * vectors.square().sum(0) * (size + values.abs() * unit)
        change = (values[:rank] - before).abs() - _TOLERANCE * values[:rank].abs()
        if basis.shape[1] == d or (change <= noise[:rank]).all():
            break
        before, block = values[:rank], solve(image)
    border, vectors = values[rank - 1], basis @ vectors
    tied = (values - border).abs() <= noise
    fixed, free = vectors[:, (values < border) & ~tied], torch.linalg.qr(vectors[:, tied])[0]
    # A gaussian projected onto the eigenspace is the same in every basis of it that rounding gives.
    gaussian = torch.randn(d, rank - fixed.shape[1], generator=generator, dtype=torch.float64)
    chosen = free @ (free.T @ gaussian.to(free))
    return torch.linalg.qr(torch.cat([fixed, chosen], 1))[0].T.contiguous()


def _orthonormal(block: Float[Tensor, "d k"], basis: Float[Tensor, "d n"]) -> Tensor:
    """The block's directions that the basis lacks; twice is enough (Parlett, 1998, Sec. 6.9)."""
    for _ in range(2):
        block = torch.linalg.qr(block - basis @ (basis.T @ block))[0]
    return block


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
