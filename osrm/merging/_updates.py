"""What a merging method reads, and what it gives back: updates made one module at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from osrm.task_vectors import LoraPair, TaskVectors

Updates = Mapping[str, Float[Tensor, "task out in"]]
"""Module name -> stack of the tasks' dense updates. Every look-up may compute it anew, so loop
over the names and let go of one stack before asking for the next."""

_BLOCK = 2**21
"""Entries of a stack that are dense at a time."""
_ROWS = 64
"""A block has a multiple of so many rows."""


@dataclass(frozen=True, eq=False)
class Masked:
    """One update for all tasks, of which each has some entries, and those rescaled (EMR)."""

    unified: Float[Tensor, "out in"]
    mask: UInt8[Tensor, "task bytes"]
    """A bit for each entry, the first in the lowest bit of the first byte."""
    rescaler: Float[Tensor, "task"]

    def row(self, task: int) -> Float[Tensor, "out in"]:
        """What the task with this number receives."""
        bits = self.mask[task, :, None] >> torch.arange(8, dtype=torch.uint8) & 1
        chosen = bits.flatten()[: self.unified.numel()].view_as(self.unified)
        return self.rescaler[task] * chosen * self.unified


Part = Tensor | LoraPair | Masked
"""What the tasks receive in one module: one update for all, dense (out, in) or as factors; or one
for each, dense (task, out, in) or masked."""


def row(part: Part, task: int) -> Float[Tensor, "out in"]:
    """What the task with this number receives, dense."""
    if isinstance(part, LoraPair):
        return (part.B @ part.A).mul_(part.scaling)
    if isinstance(part, Masked):
        return part.row(task)
    return part if part.ndim == 2 else part[task]


def pack(mask: Tensor) -> UInt8[Tensor, "task bytes"]:
    """(task, ...) of yes and no as bits, padded with no."""
    bits = mask.flatten(1).to(torch.uint8)
    bits = torch.nn.functional.pad(bits, (0, -bits.shape[1] % 8))
    return (bits.unflatten(1, (-1, 8)) << torch.arange(8, dtype=torch.uint8)).sum(
        2, dtype=torch.uint8
    )


Value = TypeVar("Value")


class Lazy(Mapping[str, Value], Generic[Value]):
    """The mapping from each name to `compute(name)`, which runs at every look-up."""

    def __init__(self, names: Collection[str], compute: Callable[[str], Value]) -> None:
        self._names = names
        self._compute = compute

    def __getitem__(self, name: str) -> Value:
        return self._compute(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Inputs(Lazy[Tensor]):
    """What a method reads: every task's update of every module, dense or as factors."""

    def __init__(self, updates: Updates, dtype: torch.dtype, tasks: Sequence[str] = ()) -> None:
        """All is computed in `dtype`; by default the tasks are the updates' own, or numbers."""
        super().__init__(updates, lambda name: updates[name].to(dtype))
        self._updates, self.dtype = updates, dtype
        if isinstance(updates, TaskVectors):
            tasks = updates.tasks
        numbers = range(0 if tasks else len(next(iter(updates.values()))))
        self.tasks = tuple(tasks or map(str, numbers))

    def like(self, compute: Callable[[str], Float[Tensor, "task out in"]]) -> Inputs:
        """Other stacks of the same tasks and modules."""
        return Inputs(Lazy(self, compute), self.dtype, self.tasks)

    def blocks(self, name: str) -> Iterator[tuple[slice, Float[Tensor, "task rows in"]]]:
        """The stack, some rows at a time, so that no more than these need be dense."""
        if pairs := self._pairs(name):
            A = [pair.A.to(self.dtype) for pair in pairs]
            B = [pair.scaling * pair.B.to(self.dtype) for pair in pairs]
            for rows in _slices(len(B[0]), len(B) * A[0].shape[1]):
                yield rows, torch.stack([b[rows] @ a for a, b in zip(A, B, strict=True)])
        else:
            stack = self[name]
            for rows in _slices(stack.shape[1], len(stack) * stack.shape[2]):
                # A copy: a loop's variable would keep the whole stack alive until the next one.
                yield rows, stack[:, rows].clone()

    def shape(self, name: str) -> tuple[int, int]:
        """(out, in) of the module."""
        if pairs := self._pairs(name):
            return pairs[0].shape
        _, out, width = self[name].shape
        return out, width

    def _pairs(self, name: str) -> tuple[LoraPair, ...]:
        return self._updates.pairs(name) if isinstance(self._updates, TaskVectors) else ()

    def by_rows(
        self, name: str, function: Callable[[Tensor], Float[Tensor, "rows in"]]
    ) -> Float[Tensor, "out in"]:
        """What the function makes of each block, put together."""
        return torch.cat([function(block) for _, block in self.blocks(name)])

    def factors(
        self, name: str
    ) -> list[tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]]:
        """Every task's (B, A) in float64 with B A = ΔW; of a dense update one is the identity."""
        if pairs := self._pairs(name):
            return [(pair.scaling * pair.B.double(), pair.A.double()) for pair in pairs]
        found = []
        for delta in self[name].double():
            unit = torch.eye(min(delta.shape), dtype=delta.dtype)
            found.append((unit, delta) if len(delta) < delta.shape[1] else (delta, unit))
        return found

    def weighted_sum(
        self, name: str, weights: Iterable[float], scale: float = 1.0
    ) -> Tensor | LoraPair:
        """λ Σ_t w_t τ_t: as factors, side by side, if there are factors."""
        if pairs := self._pairs(name):
            B = [w * p.scaling * p.B.to(self.dtype) for w, p in zip(weights, pairs, strict=True)]
            A = [pair.A.to(self.dtype) for pair in pairs]
            return LoraPair(torch.cat(A), torch.cat(B, 1), scale)
        factors = torch.tensor([*weights], dtype=self.dtype)
        return scale * torch.einsum("t,toi->oi", factors, self[name])


def _slices(rows: int, entries: int) -> Iterator[slice]:
    """Parts of so many rows with so many entries each."""
    step = max(1, _BLOCK // max(1, entries * _ROWS)) * _ROWS
    for start in range(0, max(1, rows), step):
        yield slice(start, min(start + step, rows))
