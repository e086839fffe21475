"""Second moments of layer inputs as sufficient statistics that add and subtract."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Moment:
    """Σ x xᵀ over `count` vectors of d numbers; `+` is the statistic of the union.

    Fewer than d vectors are kept as they are, since they are smaller than their d × d sum and
    can be solved with in their own span. The sum is float64, so that a direction without energy
    stays one: in float32 the rounding of the large energies would hide energies below 1e-7 of
    them. Not centred: what A h ≈ 0 asks to be small includes the mean of h.
    """

    count: int
    data: Float[Tensor, "n d"]
    """The vectors (count, d) in float32 if count < d, else Σ x xᵀ (d, d) in float64."""

    @classmethod
    def of(cls, rows: Float[Tensor, "n d"]) -> Moment:
        """The statistic of the rows; none and one are fine."""
        count, d = rows.shape
        return cls(count, rows.float() if count < d else _gram(rows))

    @property
    def is_rows(self) -> bool:
        """Whether `data` holds the vectors themselves."""
        return len(self.data) < self.data.shape[1]

    @property
    def gram(self) -> Float[Tensor, "d d"]:
        """Σ x xᵀ in float64; made anew from the vectors if there are few."""
        return _gram(self.data) if self.is_rows else self.data

    def __add__(self, other: Moment) -> Moment:
        count = self.count + other.count
        if self.is_rows and other.is_rows and count < self.data.shape[1]:
            return Moment(count, torch.cat([self.data, other.data]))
        return Moment(count, self.gram + other.gram)

    def __sub__(self, part: Moment) -> Moment:
        """The statistic without the vectors of `part`, which must be among them."""
        return Moment(self.count - part.count, self.gram - part.gram)

    def times(self, x: Float[Tensor, "d k"]) -> Float[Tensor, "d k"]:
        """E[h hᵀ] x in float64."""
        data, x = self.data.double(), x.double()
        return (data.T @ (data @ x) if self.is_rows else data @ x) / max(self.count, 1)

    def shifted_inverse(self, shift: float) -> Callable[[Tensor], Tensor]:
        """x (d, k) ↦ (E[h hᵀ] + shift I)⁻¹ x, factorised once: n × n if there are n < d vectors."""
        scale = max(self.count, 1)
        data = self.data.double()
        if not self.is_rows:
            factor = _cholesky(data / scale, shift)
            return lambda x: _cholesky_solve(factor, x)
        small = _cholesky(data @ data.T / scale, shift)
        # Woodbury: what lies in the span of the vectors is taken out of x.
        return lambda x: (x - data.T @ _cholesky_solve(small, data @ x) / scale) / shift

    def energy(self, A: Float[Tensor, "r d"]) -> float:
        """E‖A h‖² = tr(A E[h hᵀ] Aᵀ)."""
        return float((A.double() * self.times(A.T).T).sum())

    @property
    def mean_energy(self) -> float:
        """E‖h‖² / d: the energy that a random direction has on average, the mean eigenvalue."""
        data = self.data.double()
        total = data.square().sum() if self.is_rows else data.diagonal().sum()
        return float(total) / max(self.count, 1) / data.shape[1]


def _cholesky(matrix: Float[Tensor, "n n"], shift: float) -> Float[Tensor, "n n"]:
    matrix.diagonal().add_(shift)
    return torch.linalg.cholesky(matrix)


def _cholesky_solve(factor: Float[Tensor, "n n"], x: Float[Tensor, "n k"]) -> Tensor:
    """As torch.cholesky_solve, which copies the factor in each call: most of its time."""
    half = torch.linalg.solve_triangular(factor, x, upper=False)
    return torch.linalg.solve_triangular(factor.mT, half, upper=True)


def _gram(rows: Float[Tensor, "n d"], width: int = 256) -> Float[Tensor, "d d"]:
    """Σ x xᵀ in float64: only one triangle is multiplied out, in stripes of `width` rows.

    Symmetric to the last bit: not every processor's kernels make the squares on the diagonal so.
    """
    rows = rows.to(torch.float64)
    gram = rows.new_empty(2 * rows.shape[1:])
    for start in range(0, len(gram), width):
        stripe, after = slice(start, start + width), slice(start + width, None)
        torch.mm(rows[:, stripe].T, rows[:, start:], out=gram[stripe, start:])
        gram[after, stripe] = gram[stripe, after].T
        square = gram[stripe, stripe].tril_()
        square += square.tril(-1).T
    return gram


def without(total: Moment, moments: Mapping[str, Moment], task: str) -> Moment:
    """The statistic of all of `moments` but the task's, out of their sum `total`.

    So T tasks take T additions and T subtractions, not T². Few vectors are joined anew instead:
    that costs nothing, and keeps them few. So are the others of a task with most of all energy
    (there is but one), since the rounding of the difference would hide theirs.
    """
    if task not in moments:
        return total
    part = moments[task]
    if total.is_rows or 2 * part.count * part.mean_energy > total.count * total.mean_energy:
        others = (each for name, each in moments.items() if name != task)
        return reduce(add, others, Moment.of(total.data[:0]))
    return total - part
