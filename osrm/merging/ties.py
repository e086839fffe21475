"""TIES: trim, elect sign, disjoint mean (Yadav et al., 2023, Algorithm 1)."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from osrm.merging._updates import Inputs
from osrm.task_vectors import Lazy

DIGIT = 16
"""Bits of a magnitude that one pass of `trim_threshold` selects."""


def ties(
    updates: Inputs, *, density: float = 0.2, scale: float = 1.0, trim: str = "global"
) -> Mapping[str, Tensor]:
    """λ times the mean of the large entries that agree in sign, for all tasks alike.

    Each task keeps the fraction `density` of its entries, in (0, 1], by one threshold for all
    modules. The sign is that of the sum of the trimmed updates. Where this sum is zero, it is the
    majority of the elected signs of all modules, and the entry stays zero if there is none. This
    is MergeLM's convention; trim="tensor" does all of it for each module by itself (docs/merge.md).
    The updates are read twice before a first result, and once more if trimmed entries cancel.
    """

    @cache
    def threshold(names: tuple[str, ...]) -> Float[Tensor, "task"]:
        return trim_threshold(updates, names, density)

    def elect(name: str, limit: Float[Tensor, "task"]) -> Iterator[tuple[Tensor, Tensor]]:
        for _, block in updates.blocks(name):
            trimmed = block * (block.abs() >= limit[:, None, None])
            # Exact in float64, but for absurd ranges: +a and -a cancel in any order of the tasks.
            yield trimmed, trimmed.sum(0, dtype=torch.float64).sign().to(torch.int8)

    @cache
    def majority(names: tuple[str, ...]) -> int:
        limit = threshold(names)
        balance = torch.zeros((), dtype=torch.int64, device=updates.device)
        for name in names:
            for _, sign in elect(name, limit):
                balance += sign.sum()
        return int(balance.sign())

    def merged(name: str, fallback: int | None = None) -> Float[Tensor, "out in"]:
        names = tuple(updates) if trim == "global" else (name,)
        means, cancel = [], torch.tensor(False, device=updates.device)
        for trimmed, sign in elect(name, threshold(names)):
            undecided = (sign == 0) & (trimmed != 0).any(0)
            cancel = cancel | undecided.any()
            sign.masked_fill_(undecided, fallback or 0)
            agrees = trimmed * sign > 0
            means.append(scale * ((trimmed * agrees).sum(0) / agrees.sum(0).clamp(min=1)))
        if fallback is None and cancel:  # The majority needs other modules, after this one's stack.
            return merged(name, majority(names))
        return torch.cat(means)

    return Lazy(updates, merged)


def trim_threshold(updates: Inputs, names: Sequence[str], density: float) -> Float[Tensor, "task"]:
    """Each task's k-th smallest magnitude over all P entries, k = int(P · (1 - density)).

    k counts from one, as in `torch.kthvalue`; k = 0 gives 0. The floating-point product is cut off
    literally: P = 10 and density = 0.9 give k = 0. The result is exact, since non-negative floats
    have the order of their bits: a histogram of the highest 16 bits gives those of the threshold,
    a histogram of the entries with these bits gives the next 16, and so on.
    """
    bits = torch.finfo(updates.dtype).bits
    integers = {32: torch.int32, 64: torch.int64}[bits]
    prefix = rank = torch.zeros(len(updates.tasks), dtype=torch.int64, device=updates.device)
    for shift in range(bits - DIGIT, -1, -DIGIT):
        first = shift == bits - DIGIT
        counts = prefix.new_zeros(len(prefix), 2**DIGIT)
        for _, deltas in (block for name in names for block in updates.blocks(name)):
            for count, delta, above in zip(counts, deltas, prefix, strict=True):
                upper = delta.abs().flatten().view(integers) >> shift
                if not first:
                    upper = upper[upper >> DIGIT == above] & (2**DIGIT - 1)
                count += torch.bincount(upper, minlength=2**DIGIT)
        if first:
            rank = torch.full_like(prefix, int(int(counts[0].sum()) * (1 - density)))
        up_to = counts.cumsum(1)
        digit = torch.searchsorted(up_to, rank[:, None])
        rank = rank - (up_to.gather(1, digit) - counts.gather(1, digit)).squeeze(1)
        prefix = prefix << DIGIT | digit.squeeze(1)
    return prefix.to(integers).view(updates.dtype)
