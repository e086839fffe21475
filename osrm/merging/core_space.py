"""Core Space: merge small cores in bases that all adapters share (Panariello et al., 2025)."""

from collections.abc import Mapping
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from osrm.merging._factors import svd
from osrm.merging._updates import Inputs, Lazy, Part, row
from osrm.merging.task_arithmetic import task_arithmetic
from osrm.merging.ties import ties
from osrm.merging.tsv import tsv
from osrm.task_vectors import LoraPair

INNER = ("task_arithmetic", "ties", "tsv")


def core_space(
    updates: Inputs,
    *,
    inner: str = "ties",
    scale: float = 1.0,
    density: float = 0.2,
    trim: str = "tensor",
) -> Mapping[str, Part]:
    """U M Vᵀ, M being merged of the cores M_t = Uᵀ τ_t V, for all tasks alike; nothing is lost.

    U and V are the left singular vectors of all B side by side and the right ones of all A.

    Args:
        inner: how the cores are merged, `density` and `trim` being those of "ties". Sums and
            singular vectors do not depend on the basis: "task_arithmetic" and "tsv" give in the
            core what they give outside, and are simply done there.
    """
    if inner != "ties":
        return {"task_arithmetic": task_arithmetic, "tsv": tsv}[inner](updates, scale=scale)

    @cache
    def bases(name: str) -> tuple[Float[Tensor, "out k"], Float[Tensor, "l in"]]:
        B, A = zip(*updates.factors(name), strict=True)
        return svd(torch.cat(B, 1))[0], svd(torch.cat(A))[2]

    def cores(name: str) -> Float[Tensor, "task k l"]:
        U, Vh = bases(name)
        return torch.stack([(U.T @ B) @ (A @ Vh.T) for B, A in updates.factors(name)])

    merged = ties(updates.like(cores), density=density, trim=trim)

    def lifted(name: str) -> LoraPair:
        U, Vh = (basis.to(updates.dtype) for basis in bases(name))
        return LoraPair(row(merged[name], 0) @ Vh, U, scale)

    return Lazy(updates, lifted)
