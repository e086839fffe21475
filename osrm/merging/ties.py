"""TIES: trim, elect sign, disjoint mean (Yadav et al., 2023, Algorithm 1)."""

from collections.abc import Mapping, Sequence
from functools import cache

import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor

from osrm.merging._updates import Inputs, Lazy, Part

DIGIT = 16
"""A magnitude is selected by so many of its bits at a time."""
TRIMS = ("global", "tensor")


def ties(
    updates: Inputs, *, density: float = 0.2, scale: float = 1.0, trim: str = "global"
) -> Mapping[str, Part]:
    """λ times the mean of the large entries that agree in sign, for all tasks alike.

    The conventions are those of MergeLM, on which the published experiments build: one threshold
    a task over the entries of all modules together; the sign is that of the plain sum of the
    trimmed updates; an entry whose sum is zero follows the majority of the others, over all
    modules, and stays zero if there is no majority.

    Args:
        updates: read twice before the first look-up, and once more if trimmed entries cancel.
        density: fraction of entries that each task keeps, in (0, 1].
        scale: λ.
        trim: "tensor" does all that for each module by itself, as PEFT and KnOTS' authors do.
    """

    @cache
    def threshold(names: tuple[str, ...]) -> Float[Tensor, "task"]:
        return trim_threshold(updates, names, density)

    @cache
    def majority(names: tuple[str, ...]) -> int:
        return majority_sign(updates, names, threshold(names))

    def agreeing(
        name: str, limit: Float[Tensor, "task"], fallback: int
    ) -> tuple[Float[Tensor, "out in"], bool]:
        """The mean, and whether entries cancel; these have the sign `fallback`."""
        parts, cancel = [], False
        for _, deltas in updates.blocks(name):
            trimmed = trim_entries(deltas, limit)
            sign = elect_sign(trimmed)
            undecided = (sign == 0) & (trimmed != 0).any(0)
            if undecided.any():
                cancel = True
                sign[undecided] = fallback
            parts.append(scale * disjoint_mean(trimmed, sign))
        return torch.cat(parts), cancel

    def merged(name: str) -> Float[Tensor, "out in"]:
        group = tuple(updates) if trim == "global" else (name,)
        found, cancel = agreeing(name, threshold(group), 0)
        return agreeing(name, threshold(group), majority(group))[0] if cancel else found

    return Lazy(updates, merged)


def trim_entries(
    deltas: Float[Tensor, "task rows in"], threshold: Float[Tensor, "task"]
) -> Float[Tensor, "task rows in"]:
    """Entries below the task's threshold become zero; those equal to it stay."""
    return deltas * (deltas.abs() >= threshold[:, None, None])


def elect_sign(trimmed: Float[Tensor, "task rows in"]) -> Int8[Tensor, "rows in"]:
    """The sign of the sum over the tasks.

    The sum is taken in float64, where that of a few float32 is exact for all but absurd ranges:
    then +a and -a cancel, and the order of the tasks does not matter.
    """
    return trimmed.sum(0, dtype=torch.float64).sign().to(torch.int8)


def majority_sign(updates: Inputs, names: Sequence[str], threshold: Float[Tensor, "task"]) -> int:
    """The sign of the sum of the elected signs of all these modules."""
    balance = sum(
        int(elect_sign(trim_entries(block, threshold)).sum())
        for name in names
        for _, block in updates.blocks(name)
    )
    return (balance > 0) - (balance < 0)


def disjoint_mean(
    trimmed: Float[Tensor, "task rows in"], sign: Int8[Tensor, "rows in"]
) -> Float[Tensor, "rows in"]:
    """The mean over the tasks whose entry has the elected sign; zero where there is none."""
    agrees = trimmed * sign > 0
    return (trimmed * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def trim_threshold(updates: Inputs, names: Sequence[str], density: float) -> Float[Tensor, "task"]:
    """Each task's k-th smallest magnitude over all P entries, k = int(P · (1 - density)).

    k counts from one, as in `torch.kthvalue`; k = 0 gives 0, so that nothing is trimmed. The
    floating-point product is cut off literally: P = 10 and density = 0.9 give k = 0.

    Exact, in a pass and 65,536 counters a task for each 16 bits of a number: non-negative floats
    are ordered like their bits, so the highest digit of the answer is read off a histogram of
    highest digits, the next off a histogram of the entries that share that digit, and so on.
    """
    bits = torch.finfo(updates.dtype).bits
    prefix = torch.zeros(len(updates.tasks), dtype=torch.int64)
    rank = prefix
    for shift in range(bits - DIGIT, -1, -DIGIT):
        counts = torch.zeros(len(prefix), 2**DIGIT, dtype=torch.int64)
        for name in names:
            for _, deltas in updates.blocks(name):
                for count, delta, above in zip(counts, deltas, prefix.tolist(), strict=True):
                    count += histogram(magnitude_bits(delta), shift, above, bits)
        if shift == bits - DIGIT:
            rank = torch.full_like(prefix, int(int(counts[0].sum()) * (1 - density)))
        digit, rank = locate(counts, rank)
        prefix = prefix << DIGIT | digit
    integers = {32: torch.int32, 64: torch.int64}[bits]
    return prefix.to(integers).view(updates.dtype)


def magnitude_bits(delta: Float[Tensor, "rows in"]) -> Int[Tensor, "entry"]:
    """|τ| as integers of the same order."""
    return delta.abs().flatten().view({4: torch.int32, 8: torch.int64}[delta.element_size()])


def histogram(
    magnitudes: Int[Tensor, "entry"], shift: int, above: int, bits: int
) -> Int[Tensor, "digit"]:
    """How often each digit occurs at this place, among the entries that have `above` above it."""
    upper = magnitudes >> shift
    if shift + DIGIT < bits:
        upper = upper[upper >> DIGIT == above] & (2**DIGIT - 1)
    return torch.bincount(upper, minlength=2**DIGIT)


def locate(
    counts: Int[Tensor, "task digit"], rank: Int[Tensor, "task"]
) -> tuple[Int[Tensor, "task"], Int[Tensor, "task"]]:
    """The digit that the rank-th smallest has, and its rank among the entries of that digit."""
    up_to = counts.cumsum(1)
    value = (up_to < rank[:, None]).sum(1)
    below = (up_to - counts).gather(1, value[:, None]).squeeze(1)
    return value, rank - below
