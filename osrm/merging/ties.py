"""TIES: trim, elect sign, disjoint mean (Yadav et al., 2023, Algorithm 1)."""

from functools import reduce

import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor

from osrm.merging._updates import LazyUpdates, Updates

HALF = 16
"""A magnitude is selected by the high, then by the low 16 of its 32 bits."""


def ties(updates: Updates, *, density: float = 0.2, scale: float = 1.0) -> Updates:
    """λ times the mean of the large entries that agree in sign, for all tasks alike.

    The conventions are those of MergeLM, on which the published experiments build: one threshold
    a task over the entries of all modules together (PEFT trims module by module); the sign is
    that of the plain sum of the trimmed updates; an entry whose sum is zero follows the majority
    of the others, over all modules, and stays zero if there is no majority.

    Args:
        updates: the stack τ of every module. It is read three times before the first look-up.
        density: fraction of entries that each task keeps, in (0, 1].
        scale: λ.
    """
    threshold = trim_threshold(updates, density)
    majority = majority_sign(updates, threshold)

    def merged(name: str) -> Float[Tensor, "task out in"]:
        trimmed = trim(updates[name], threshold)
        sign = elect_sign(trimmed)
        sign = torch.where(sign == 0, majority, sign)
        return (scale * disjoint_mean(trimmed, sign)).expand_as(trimmed)

    return LazyUpdates(updates, merged)


def trim(
    deltas: Float[Tensor, "task out in"], threshold: Float[Tensor, "task"]
) -> Float[Tensor, "task out in"]:
    """Entries below the task's threshold become zero; those equal to it stay."""
    return deltas * (deltas.abs() >= threshold[:, None, None])


def elect_sign(trimmed: Float[Tensor, "task out in"]) -> Int8[Tensor, "out in"]:
    """The sign of the sum over the tasks.

    The sum is taken in float64, where that of a few float32 is exact for all but absurd ranges:
    then +a and -a cancel, and the order of the tasks does not matter.
    """
    return trimmed.sum(0, dtype=torch.float64).sign().to(torch.int8)


def majority_sign(updates: Updates, threshold: Float[Tensor, "task"]) -> int:
    """The sign of the sum of the elected signs of all modules."""
    balance = sum(int(elect_sign(trim(updates[name], threshold)).sum()) for name in updates)
    return (balance > 0) - (balance < 0)


def disjoint_mean(
    trimmed: Float[Tensor, "task out in"], sign: Int8[Tensor, "out in"]
) -> Float[Tensor, "out in"]:
    """The mean over the tasks whose entry has the elected sign; zero where there is none."""
    agrees = trimmed * sign > 0
    return (trimmed * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def trim_threshold(updates: Updates, density: float) -> Float[Tensor, "task"]:
    """Each task's k-th smallest magnitude over all P entries, k = int(P · (1 - density)).

    k counts from one, as in `torch.kthvalue`; k = 0 gives 0, so that nothing is trimmed. The
    floating-point product is cut off literally: P = 10 and density = 0.9 give k = 0.

    Exact, in two passes and 2 · 65,536 counters a task: non-negative floats are ordered like
    their bits, so the high half of the answer's bits is read off a histogram of high halves, and
    its low half off a histogram of the entries that share that high half.
    """
    by_high = reduce(torch.add, (count_high(updates[name]) for name in updates))
    k = int(int(by_high[0].sum()) * (1 - density))
    high, rank = locate(by_high, torch.full_like(by_high[:, 0], k))
    by_low = reduce(torch.add, (count_low(updates[name], high) for name in updates))
    low, _ = locate(by_low, rank)
    return (high << HALF | low).to(torch.int32).view(torch.float32)


def count_high(deltas: Float[Tensor, "task out in"]) -> Int[Tensor, "task half"]:
    """Each task's histogram of the high half of the bits of |τ|."""
    return torch.stack([histogram(magnitude_bits(delta) >> HALF) for delta in deltas])


def count_low(
    deltas: Float[Tensor, "task out in"], high: Int[Tensor, "task"]
) -> Int[Tensor, "task half"]:
    """Each task's histogram of the low half, of the entries with the given high half."""
    counts = []
    for delta, task_high in zip(deltas, high, strict=True):
        bits = magnitude_bits(delta)
        counts.append(histogram(bits[bits >> HALF == task_high] & (2**HALF - 1)))
    return torch.stack(counts)


def magnitude_bits(delta: Float[Tensor, "out in"]) -> Int[Tensor, "entry"]:
    """|τ| as integers of the same order."""
    return delta.abs().flatten().view(torch.int32)


def histogram(halves: Int[Tensor, "entry"]) -> Int[Tensor, "half"]:
    """How often each of the 2¹⁶ values occurs."""
    return torch.bincount(halves, minlength=2**HALF)


def locate(
    counts: Int[Tensor, "task half"], rank: Int[Tensor, "task"]
) -> tuple[Int[Tensor, "task"], Int[Tensor, "task"]]:
    """The value that the rank-th smallest has, and its rank among the entries of that value."""
    up_to = counts.cumsum(1)
    value = (up_to < rank[:, None]).sum(1)
    below = (up_to - counts).gather(1, value[:, None]).squeeze(1)
    return value, rank - below
