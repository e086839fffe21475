"""DARE: drop entries at random and rescale the rest, then merge (Yu et al., 2024)."""

import hashlib
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from osrm.merging._updates import Inputs, Parts
from osrm.merging.ties import ties
from osrm.task_vectors import Lazy

ROWS = 64
"""The rows of one draw: another number changes the results."""


class Dropped(Inputs):
    """Each entry is zero with probability `drop_rate`; the others are divided by 1 - drop_rate.

    The draws depend on the seed and the names of task and module alone, not on order or blocks;
    they are the CPU's on every device.
    """

    def __init__(self, updates: Inputs, drop_rate: float, seed: int) -> None:
        super().__init__(updates, updates.dtype, updates.tasks, updates.device)
        self.whole, self.drop_rate, self.seed = updates, drop_rate, seed

    def __getitem__(self, name: str) -> Float[Tensor, "task out in"]:
        return torch.cat([block for _, block in self.blocks(name)], 1)

    def blocks(
        self, name: str, multiple: int = ROWS
    ) -> Iterator[tuple[slice, Float[Tensor, "task rows in"]]]:
        """The stack after the drops, in blocks of rows."""
        for rows, block in self.whole.blocks(name, multiple):
            kept = torch.empty(block.shape, dtype=torch.bool)
            for task, mask in zip(self.tasks, kept, strict=True):
                for start, entries in zip(range(rows.start, rows.stop, ROWS), mask.split(ROWS)):
                    label = f"{self.seed}/{task}/{name}/{start}".encode()
                    seed = int.from_bytes(hashlib.sha256(label).digest()[:8], "little")
                    draws = torch.rand(entries.shape, generator=torch.Generator().manual_seed(seed))
                    entries.copy_(draws >= self.drop_rate)
            yield rows, block * kept.to(self.device) / (1 - self.drop_rate)


def dare_linear(
    updates: Inputs, *, drop_rate: float = 0.5, seed: int = 0, scale: float = 1.0
) -> Parts:
    """λ Σ_t DARE(τ_t): task arithmetic after the drops."""
    dropped = Dropped(updates, drop_rate, seed)

    def merged(name: str) -> Float[Tensor, "out in"]:
        return scale * torch.cat([block.sum(0) for _, block in dropped.blocks(name)])

    return Lazy(updates, merged)


def dare_ties(
    updates: Inputs,
    *,
    drop_rate: float = 0.5,
    seed: int = 0,
    density: float = 1.0,
    scale: float = 1.0,
    trim: str = "global",
) -> Parts:
    """TIES after the drops; by default without trimming, as in PEFT and mergekit."""
    return ties(Dropped(updates, drop_rate, seed), density=density, scale=scale, trim=trim)
