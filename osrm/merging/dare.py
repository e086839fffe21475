"""DARE: drop entries at random and rescale the rest, then merge (Yu et al., 2024)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from osrm.merging._updates import Inputs, Lazy, Part
from osrm.merging.ties import ties

_CHUNK = 64
"""Rows of one draw: what falls out must not depend on how the work is cut into blocks."""


class Dropped(Inputs):
    """Each entry is zero with probability `drop_rate`, the others are divided by 1 - drop_rate.

    What is drawn depends on the seed and on the names of task and module alone, not on what else
    is merged or in which order.
    """

    def __init__(self, updates: Inputs, drop_rate: float, seed: int) -> None:
        super().__init__(updates, updates.dtype, updates.tasks)
        self.whole, self.drop_rate, self.seed = updates, drop_rate, seed

    def blocks(self, name: str) -> Iterator[tuple[slice, Float[Tensor, "task rows in"]]]:
        """The stack, some rows at a time, with what has dropped out of it."""
        for rows, block in self.whole.blocks(name):
            kept = torch.stack([self._kept(task, name, rows, block[0]) for task in self.tasks])
            yield rows, block * kept / (1 - self.drop_rate)

    def __getitem__(self, name: str) -> Float[Tensor, "task out in"]:
        return torch.cat([block for _, block in self.blocks(name)], 1)

    def _kept(self, task: str, name: str, rows: slice, like: Tensor) -> Tensor:
        chunks = []
        for start in range(rows.start, rows.stop, _CHUNK):
            text = f"{self.seed}/{task}/{name}/{start}"
            seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
            generator = torch.Generator().manual_seed(seed)
            size = (min(_CHUNK, rows.stop - start), like.shape[1])
            chunks.append(torch.rand(size, generator=generator) >= self.drop_rate)
        return torch.cat(chunks)


def dare_linear(
    updates: Inputs,
    *,
    drop_rate: float = 0.5,
    seed: int = 0,
    scale: float = 1.0,
    weights: Sequence[float] | None = None,
) -> Mapping[str, Part]:
    """λ Σ_t w_t DARE(τ_t): task arithmetic of what is left."""
    dropped = Dropped(updates, drop_rate, seed)
    given = weights or [1.0] * len(updates.tasks)

    def merged(name: str) -> Float[Tensor, "out in"]:
        factors = torch.tensor(given, dtype=updates.dtype)[:, None, None]
        return scale * dropped.by_rows(name, lambda block: (factors * block).sum(0))

    return Lazy(updates, merged)


def dare_ties(
    updates: Inputs,
    *,
    drop_rate: float = 0.5,
    seed: int = 0,
    density: float = 1.0,
    scale: float = 1.0,
    trim: str = "global",
) -> Mapping[str, Part]:
    """TIES of what is left; density 1, as in PEFT and mergekit, drops at random alone."""
    return ties(Dropped(updates, drop_rate, seed), density=density, scale=scale, trim=trim)
