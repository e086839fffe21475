"""Second moments of layer inputs as sufficient statistics that add."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Covariance:
    """Count, mean and scatter of a set of vectors; `+` is the statistic of the union.

    "All tasks but mine" is a sum, and so are batches and shards. Everything is float64, so that
    a direction without energy stays one: in float32 the rounding of the large energies would
    hide energies below 1e-7 of them.
    """

    count: int
    mean: Float[Tensor, "d"]
    scatter: Float[Tensor, "d d"]
    """Σ (x - mean)(x - mean)ᵀ"""

    @classmethod
    def of(cls, rows: Float[Tensor, "n d"]) -> Covariance:
        """The statistic of the rows; n = 0 and n = 1 are fine."""
        rows = rows.to(torch.float64)
        mean = rows.mean(0) if len(rows) else rows.new_zeros(rows.shape[1])
        centred = rows - mean
        return cls(len(rows), mean, centred.T @ centred)

    def __add__(self, other: Covariance) -> Covariance:
        """Chan, Golub and LeVeque (1979), eq. 2.1: exact for any split, without cancellation."""
        count = self.count + other.count
        if count == 0:
            return self
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        between = torch.outer(delta, delta) * (self.count * other.count / count)
        return Covariance(count, mean, self.scatter + other.scatter + between)

    @property
    def moment(self) -> Float[Tensor, "d d"]:
        """E[x xᵀ], not centred: what A h ≈ 0 asks to be small includes the mean of h."""
        return self.scatter / max(self.count, 1) + torch.outer(self.mean, self.mean)
