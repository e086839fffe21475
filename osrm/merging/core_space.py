"""Core Space: merge small cores in bases that all adapters share (Panariello et al., 2025)."""

from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from osrm.merging._factors import svd
from osrm.merging._updates import Inputs, Parts
from osrm.merging.task_arithmetic import task_arithmetic
from osrm.merging.ties import ties
from osrm.merging.tsv import tsv
from osrm.task_vectors import Lazy, LoraPair


def core_space(
    updates: Inputs,
    *,
    inner: str = "ties",
    scale: float = 1.0,
    density: float = 0.2,
    trim: str = "tensor",
) -> Parts:
    """U M Vᵀ, for all tasks alike.

    `inner` merges the cores M_t = Uᵀ τ_t V to M. U has the left singular vectors of all B side by
    side, V the right ones of all A. `density` and `trim` are those of TIES, and count the entries
    of the cores. "task_arithmetic" and "tsv" give the same without cores, so they run without.
    """
    if inner != "ties":
        return (tsv if inner == "tsv" else task_arithmetic)(updates, scale=scale)

    @cache
    def bases(name: str) -> tuple[Float[Tensor, "out k"], Float[Tensor, "l in"]]:
        B, A = zip(*updates.factors(name))
        return svd(torch.cat(B, 1))[0], svd(torch.cat(A))[2]

    def cores(name: str) -> Float[Tensor, "task k l"]:
        U, Vh = bases(name)
        return torch.stack([(U.T @ B) @ (A @ Vh.T) for B, A in updates.factors(name)])

    merged = ties(updates.like(cores), density=density, trim=trim)

    def lifted(name: str) -> LoraPair:
        U, Vh = (basis.to(updates.dtype) for basis in bases(name))
        return LoraPair(merged[name] @ Vh, U, scale)

    return Lazy(updates, lifted)
