"""Which subspace may an update live in? OSRM, Sec. 4: the one where other tasks have no energy."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Generator, Tensor


def minor_subspace(
    moment: Float[Tensor, "d d"], rank: int, generator: Generator
) -> Float[Tensor, "rank d"]:
    """A = argmin tr(A S Aᵀ) subject to A Aᵀ = I: the minor eigenvectors of the moment S.

    The minimum is the sum of the `rank` smallest eigenvalues. Where it is attained by many
    frames (the eigenvalue at the border is repeated: above all the null space of a statistic of
    few vectors) the frame is drawn uniformly from `generator` inside that eigenspace. A
    linear-algebra library would return the same arbitrary vectors for every task instead, and
    the tasks would meet in them.

    Args:
        moment: symmetric and positive semi-definite, E[h hᵀ] of the other tasks' features.
        rank: number of directions, 1 <= rank <= d.
        generator: a CPU generator; used for the choice inside a repeated eigenvalue alone.

    Raises:
        ValueError: rank is not in 1..d, or the moment is not finite.
    """
    d = len(moment)
    if not 1 <= rank <= d:
        raise ValueError(f"rank {rank} is not in 1..{d}")
    if not moment.isfinite().all():
        raise ValueError("the moment holds NaN or infinity")
    energies, directions = torch.linalg.eigh(moment.to(torch.float64))
    # Two energies closer than the rounding of the moment itself are one.
    rounding = d * torch.finfo(moment.dtype).eps * energies[-1]
    border = energies[rank - 1]
    fixed = directions[:, energies < border - rounding]
    free = directions[:, (energies - border).abs() <= rounding]
    frame = random_frame(free.shape[1], rank - fixed.shape[1], generator).to(free)
    return torch.cat([fixed, free @ frame.T], dim=1).T.contiguous()


def random_frame(d: int, rank: int, generator: Generator) -> Float[Tensor, "rank d"]:
    """Orthonormal rows, uniform over all frames (QR of a gaussian, signs fixed; Mezzadri 2007)."""
    gaussian = torch.randn(d, rank, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    return (q * r.diagonal().sign()).T.contiguous()
