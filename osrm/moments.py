"""Second moments of layer inputs as sufficient statistics that add and subtract."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Moment:
    """Σ x xᵀ over `count` vectors of d numbers; `+` is the statistic of the union.

    Fewer than d vectors are kept as they are: they are smaller than the d × d sum, and systems
    are solved in their span. The sum is float64, on a GPU too: in float32 the rounding of the
    large energies would hide energies below 1e-8 of them (docs/speed.md). Not centred, since
    A h ≈ 0 includes the mean of h.
    """

    count: int
    data: Float[Tensor, "n d"]
    """The vectors (count, d) in float32 if count < d, else Σ x xᵀ (d, d) in float64."""

    @classmethod
    def of(cls, rows: Float[Tensor, "n d"]) -> Moment:
        """The statistic of any number of rows, also of none."""
        return cls(len(rows), rows.float() if len(rows) < rows.shape[1] else _gram(rows))

    @property
    def is_rows(self) -> bool:
        """Whether `data` holds the vectors."""
        return len(self.data) < self.data.shape[1]

    @property
    def gram(self) -> Float[Tensor, "d d"]:
        """Σ x xᵀ in float64; computed at each call if `data` holds vectors."""
        return _gram(self.data) if self.is_rows else self.data

    def to(self, device: torch.device | str) -> Moment:
        """The statistic in the memory of this device."""
        return Moment(self.count, self.data.to(device))

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
        """x (d, k) ↦ (E[h hᵀ] + shift I)⁻¹ x, factorised once: n × n for n < d vectors."""
        data, scale = self.data.double(), max(self.count, 1)
        matrix = (data @ data.T if self.is_rows else data) / scale
        matrix.diagonal().add_(shift)
        factor = torch.linalg.cholesky(matrix)
        if not self.is_rows:
            return lambda x: _cholesky_solve(factor, x)
        # Woodbury's identity.
        return lambda x: (x - data.T @ _cholesky_solve(factor, data @ x) / scale) / shift

    def energy(self, A: Float[Tensor, "r d"]) -> float:
        """E‖A h‖² = tr(A E[h hᵀ] Aᵀ)."""
        return float((A.double() * self.times(A.T).T).sum())

    @property
    def mean_energy(self) -> float:
        """E‖h‖² / d, the mean eigenvalue: a random direction has this energy on average."""
        data = self.data.double()
        total = data.square().sum() if self.is_rows else data.diagonal().sum()
        return float(total) / max(self.count, 1) / data.shape[1]


def _cholesky_solve(factor: Float[Tensor, "n n"], x: Float[Tensor, "n k"]) -> Tensor:
    """As torch.cholesky_solve, which spends most of its time on a copy of the factor."""
    half = torch.linalg.solve_triangular(factor, x, upper=False)
    return torch.linalg.solve_triangular(factor.mT, half, upper=True)


def _gram(rows: Float[Tensor, "n d"], width: int = 256) -> Float[Tensor, "d d"]:
    """Σ x xᵀ in float64: only one triangle is multiplied out, in stripes of `width` rows.

    Symmetric to the last bit, which a processor's own product is not everywhere.
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


def own_and_others(
    moments: Mapping[str, Moment], tasks: Iterable[str], others: Iterable[str]
) -> Iterator[tuple[str, Moment | None, Moment | None]]:
    """For each of `tasks`: its name, its own statistic, and that of all `others` but itself.

    None stands for a statistic that does not exist. `moments` are those of one module; `others`
    that have none are left out. T tasks take T additions and T subtractions, not T².
    """
    avoided = {task: moments[task] for task in others if task in moments}
    total = reduce(add, avoided.values()) if avoided else None
    for task in tasks:
        part = avoided.get(task)
        if total is None or part is None:
            remainder = total
        elif len(avoided) == 1:
            remainder = None
        # Few vectors stay vectors. A part with more than half of all energy (there is at most one)
        # is not subtracted: the rounding would be larger than small energies of the rest.
        elif total.is_rows or 2 * part.count * part.mean_energy > total.count * total.mean_energy:
            remainder = reduce(add, (avoided[name] for name in avoided if name != task))
        else:
            remainder = total - part
        yield task, moments.get(task), remainder
