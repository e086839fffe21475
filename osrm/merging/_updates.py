"""What a merging method reads and returns: updates that are made one module at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from osrm.task_vectors import Factors, Lazy, LoraPair, TaskVectors

Updates = Mapping[str, Float[Tensor, "task out in"]]
"""Module name -> stack of the tasks' dense updates. A look-up may compute the stack anew, so a
loop over the modules holds one stack at a time."""
_BLOCK, _BLOCK_ON_GPU = 2**19, 2**25
"""The entries of a block: few enough for a cache, or enough for all of a GPU."""
SIDE_BY_SIDE = 4
"""So many modules at most are computed at a time."""
Value = TypeVar("Value")


@dataclass(frozen=True, eq=False)
class Masked:
    """One update for all tasks, with a mask and a factor for each task (EMR)."""

    unified: Float[Tensor, "out in"]
    mask: UInt8[Tensor, "task bytes"]
    """A bit for each entry; the first entry is the lowest bit of the first byte."""
    rescaler: Float[Tensor, "task"]


Part = Tensor | LoraPair | Masked
"""What the tasks receive in one module: one update for all, dense (out, in) or as factors; or one
for each, dense (task, out, in) or masked."""
Parts = Mapping[str, Part]
"""What a method returns: the part of every module."""
Weights = Sequence[float] | None


def row(part: Part, task: int) -> Float[Tensor, "out in"]:
    """What the task with this number receives, dense."""
    if isinstance(part, LoraPair):
        return part.dense(part.B.dtype)
    if isinstance(part, Masked):
        bits = part.mask[task, :, None] >> _places(part.mask) & 1
        chosen = bits.flatten()[: part.unified.numel()].view_as(part.unified)
        return part.rescaler[task] * chosen * part.unified
    return part if part.ndim == 2 else part[task]


def pack(mask: Tensor) -> UInt8[Tensor, "task bytes"]:
    """The bits of (task, ...) true and false, padded with false."""
    flat = mask.flatten(1)
    eights = torch.nn.functional.pad(flat, (0, -flat.shape[1] % 8)).view(torch.int64)
    # The product's highest byte has the lowest bit of each of the eight bytes (little-endian).
    return (eights * 0x0102040810204080 >> 56).to(torch.uint8)


def elect(block: Float[Tensor, "task rows in"], tie: int = -1) -> tuple[Tensor, Tensor]:
    """Σ_t τ_t (rows, in) with the sign γ that it has in float64, and max(γ τ_t, 0) of each task.

    Where the sum is zero, γ is `tie`, +1 or -1. In float64 +a and -a cancel in any order of the
    tasks, but for absurd ranges.
    """

    def agreeing(total: Tensor) -> Tensor:
        sign = (total.sign() + tie / 2).sign_().to(block.dtype)
        return (block * sign).clamp_(min=0)

    if block.device.type == "cpu":  # A GPU would wait for the comparison.
        total = block.sum(0)
        agree = agreeing(total)
        # The rounding error is below T ε / 2 · Σ_t |τ_t|, of which at least half agrees.
        error = len(block) * torch.finfo(block.dtype).eps * agree.sum(0)
        if (total.abs() - error >= 0).all():  # not so for infinity minus infinity
            return total, agree
    total = block.sum(0, dtype=torch.float64)
    return total, agreeing(total)


def _places(bits: Tensor) -> UInt8[Tensor, "8"]:
    return torch.arange(8, dtype=torch.uint8, device=bits.device)


class Inputs(Lazy[Tensor]):
    """Every task's update of every module, dense or as factors, in one float type, on a device."""

    def __init__(
        self,
        updates: Updates,
        dtype: torch.dtype,
        tasks: Sequence[str] = (),
        device: torch.device | str = "cpu",
    ) -> None:
        """`tasks` are the names; by default those of `TaskVectors`, or else numbers."""
        super().__init__(updates, lambda name: updates[name].to(device, dtype))
        self.dtype, self.device = dtype, torch.device(device)
        self._vectors = updates if isinstance(updates, TaskVectors) else None
        names = self._vectors.tasks if self._vectors else tasks
        self.tasks = tuple(names or map(str, range(len(next(iter(updates.values()))))))

    def like(self, compute: Callable[[str], Float[Tensor, "task out in"]]) -> Inputs:
        """Other stacks of the same tasks and modules."""
        return Inputs(Lazy(self, compute), self.dtype, self.tasks, self.device)

    def blocks(
        self, name: str, multiple: int = 8
    ) -> Iterator[tuple[slice, Float[Tensor, "task rows in"]]]:
        """The stack in blocks of rows, each a copy; of factors, one block at a time is dense.

        All but the last have a multiple of `multiple` rows: of eight, so that masks fill bytes.
        """
        pairs = self._pairs(name)
        factors = [pair.factors(self.dtype) for pair in pairs]
        stack = torch.empty(0) if pairs else self[name]
        out, width = pairs[0].shape if pairs else stack.shape[1:]
        entries = _BLOCK if self.device.type == "cpu" else _BLOCK_ON_GPU
        step = max(1, entries // max(1, len(self.tasks) * width * multiple)) * multiple
        # No row is left over: the product of a single row rounds otherwise.
        for start, stop in pairwise([*range(0, max(1, out - 1), step), out]):
            if pairs:
                block = factors[0][0].new_empty(len(pairs), stop - start, width)
                for delta, (B, A) in zip(block, factors):
                    torch.mm(B[start:stop], A, out=delta)
            else:  # A view in the caller's loop would keep the whole stack alive.
                block = stack[:, start:stop].clone()
            yield slice(start, stop), block

    def side_by_side(
        self, function: Callable[[str], Value], names: Collection[str]
    ) -> Iterator[Value]:
        """function(module) of each, in order. On a CPU some run at a time, each on a share of the
        threads: small operations use the cores better so than with all threads in every operation.
        Modules that are not factors are too large for that.
        """
        threads = torch.get_num_threads()
        workers = min(SIDE_BY_SIDE, threads)
        if self.device.type != "cpu" or workers == 1 or not all(map(self._pairs, names)):
            yield from map(function, names)
            return
        share = (threads // workers,)
        try:
            with ThreadPoolExecutor(workers, "module", torch.set_num_threads, share) as pool:
                yield from pool.map(function, names)
        finally:
            torch.set_num_threads(threads)

    def factors(self, name: str) -> list[Factors]:
        """Every task's (B, A) in float64 with B A = ΔW; for a dense ΔW one is the identity."""
        if pairs := self._pairs(name):
            return [pair.factors(torch.float64) for pair in pairs]
        deltas = self[name].double()
        unit = torch.eye(min(deltas.shape[1:]), dtype=deltas.dtype, device=self.device)
        wide = deltas.shape[1] < deltas.shape[2]
        return [(unit, delta) if wide else (delta, unit) for delta in deltas]

    def sum(self, name: str, scale: float = 1.0) -> Tensor | LoraPair:
        """λ Σ_t τ_t; of factors, they stand side by side."""
        if pairs := self._pairs(name):
            B, A = zip(*(pair.factors(self.dtype) for pair in pairs))
            return LoraPair(torch.cat(A), torch.cat(B, 1), scale)
        return scale * self[name].sum(0)

    def _pairs(self, name: str) -> tuple[LoraPair, ...]:
        pairs = self._vectors.pairs(name) if self._vectors else ()
        return tuple(pair.to(self.device) for pair in pairs)


class Weighted(Inputs):
    """The updates w_t τ_t."""

    def __init__(self, updates: Inputs, weights: Sequence[float]) -> None:
        super().__init__(updates, updates.dtype, updates.tasks, updates.device)
        self.whole, self.weights = updates, weights

    def __getitem__(self, name: str) -> Float[Tensor, "task out in"]:
        weights = torch.tensor(self.weights, dtype=self.dtype, device=self.device)
        return self.whole[name] * weights[:, None, None]

    def _pairs(self, name: str) -> tuple[LoraPair, ...]:
        return tuple(pair.scaled(w) for pair, w in zip(self.whole._pairs(name), self.weights))
