"""TIES: trim, elect sign, disjoint mean (Yadav et al., 2023, Algorithm 1)."""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from math import gcd
from threading import Lock

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from osrm.merging._updates import Inputs, elect
from osrm.task_vectors import Lazy

STRIDE, SAMPLE = 61, 2**19
"""A sample has every so many-th entry of a task. Above so many, every third of them is kept."""
BITS = {torch.float32: torch.int32, torch.float64: torch.int64}
"""Integers of the same size. The bits of positive floats have the floats' order."""


def ties(
    updates: Inputs, *, density: float = 0.2, scale: float = 1.0, trim: str = "global"
) -> Mapping[str, Tensor]:
    """λ times the mean of the large entries that agree in sign, for all tasks alike.

    Each task keeps the fraction `density` of its entries, in (0, 1], by one threshold for all
    modules. The sign is that of the sum of the trimmed updates. Where this sum is zero, it is the
    majority of the elected signs of all modules, and the entry stays zero if there is none. This
    is MergeLM's convention; trim="tensor" does all of it for each module by itself (docs/merge.md).
    The updates are read twice before a first result, and up to six times if there are few or they
    mislead `trim_threshold`; once more if trimmed entries cancel. Density 1 needs no threshold.
    """

    @cache
    def limits(names: tuple[str, ...]) -> list[float]:
        """For each task the largest magnitude that is trimmed."""
        threshold = trim_threshold(updates, names, density)
        return threshold.nextafter(torch.full_like(threshold, -1)).tolist()

    def trimmed(name: str, limits: list[float]) -> Iterator[Float[Tensor, "task rows in"]]:
        for _, block in updates.blocks(name):
            for delta, limit in zip(block, limits, strict=True):
                torch.hardshrink(delta, limit, out=delta)
            yield block

    @cache
    def majority(names: tuple[str, ...]) -> int:
        balance = torch.zeros((), dtype=torch.float64, device=updates.device)
        for name in names:
            for block in trimmed(name, limits(names)):
                balance += block.sum(0, dtype=torch.float64).sign().sum()
        return int(balance.sign())

    def merged(name: str, fallback: int | None = None) -> Float[Tensor, "out in"]:
        names = tuple(updates) if trim == "global" else (name,)
        means, cancel = [], torch.tensor(False, device=updates.device)
        for block in trimmed(name, limits(names)):
            total, agreeing = elect(block, fallback or -1)
            size = agreeing.sum(0)
            undecided = (total == 0) & (size > 0)
            cancel = cancel | undecided.any()
            sign = total.sign().to(updates.dtype)
            if fallback:
                sign.masked_fill_(undecided, fallback)
            means.append(scale * (sign * size / agreeing.sign_().sum(0).clamp_(min=1)))
        if fallback is None and cancel:  # The majority needs other modules, after this one's stack.
            with lock:  # or modules that are merged side by side would all ask for it
                sign_of_most = majority(names)
            return merged(name, sign_of_most)
        return torch.cat(means)

    lock = Lock()
    if trim == "global":
        limits(tuple(updates))
    return Lazy(updates, merged)


def trim_threshold(updates: Inputs, names: Sequence[str], density: float) -> Float[Tensor, "task"]:
    """Each task's k-th smallest magnitude over all P entries, k = int(P · (1 - density)).

    k counts from one, as in `torch.kthvalue`; k = 0 gives 0. The floating-point product is cut off
    literally: P = 10 and density = 0.9 give k = 0. A sample, read first, says between which floats
    the threshold should be, and a histogram of the entries between them finds it, or the bin for a
    finer one. If the sample misleads, they start from all floats, so the result is exact. Float32
    updates are read two to four times, and float64 ones up to six times.
    """

    def every(name: str) -> tuple[int, Float[Tensor, "task entries"]]:
        """The entries of a module, and each of so many of them."""
        entries, some = 0, []
        for _, block in updates.blocks(name):
            some.append(block.flatten(1)[:, -entries % STRIDE :: STRIDE].abs())
            entries += block[0].numel()
        return entries, torch.cat(some, 1)

    zero = torch.zeros(len(updates.tasks), dtype=updates.dtype, device=updates.device)
    total, thinned, count, parts = 0, 1, 0, []
    # Density 1 means k = 0, whatever P is.
    for entries, some in updates.side_by_side(every, names if density < 1 else ()):
        parts.append(some[:, ::thinned])
        total, count = total + entries, count + parts[-1].shape[1]
        if count > SAMPLE:
            parts, thinned = [torch.cat(parts, 1)[:, ::3]], 3 * thinned
            count = parts[0].shape[1]
    k = int(total * (1 - density))
    if k == 0:
        return zero
    sample = torch.cat(parts, 1).sort(1).values
    place, margin = count * k / total, 4 * (count * density * (1 - density)) ** 0.5
    ends = pad(pad(sample, (1, 0)), (0, 1), value=torch.nan).view(BITS[zero.dtype])
    low = ends[:, max(0, int(place - margin))].long()
    high = ends[:, min(count + 1, int(place + margin) + 2)].long()
    digits = min(20, max(16, total.bit_length() - 4))
    below, counts, shift = histogram(updates, names, low, high, digits=digits)
    if not ((below < k) & (k <= below + counts.sum(1))).all():
        low, high = ends[:, 0].long(), ends[:, -1].long()
        below, counts, shift = histogram(updates, names, low, high, digits=digits)
    rank = (k - below)[:, None]
    while True:
        up_to = counts.cumsum(1)
        digit = torch.searchsorted(up_to, rank)
        rank = rank - up_to.gather(1, digit) + counts.gather(1, digit)
        low = low + (digit.squeeze(1) << shift)
        if shift == 0:
            return low.to(ends.dtype).view(zero.dtype)
        _, counts, shift = histogram(updates, names, low, low + (1 << shift) - 1, digits=digits)


def histogram(
    updates: Inputs, names: Sequence[str], low: Tensor, high: Tensor, *, digits: int
) -> tuple[Tensor, Tensor, int]:
    """(below, counts, shift): of each task the entries below `low`, and those of each bin (task,
    bins) from `low` to `high`. The ends are bits of floats; a bin has 2 ** shift floats.

    Few entries are between the ends: a look at sixteen together skips most others.
    """
    width = int((high - low).max())
    shift = max(0, width.bit_length() - digits)
    below, counts = torch.zeros_like(low), low.new_zeros(len(low), (width >> shift) + 1)
    offsets = counts.shape[1] * torch.arange(len(low), device=low.device)
    bits, lock = BITS[updates.dtype], Lock()
    first, last = (end.to(bits).view(updates.dtype)[:, None, None] for end in (low, high))
    middle = first / 2 + last / 2
    reach = torch.maximum(middle - first, last - middle)

    def count(name: str) -> None:
        for _, block in updates.blocks(name):
            sizes = block.flatten(1).abs_()
            group = gcd(16, sizes.shape[1])
            groups = sizes.view(len(low), group, sizes.shape[1] // group)
            # Not farther, rather than near: NaN, the end of all floats, excludes nothing.
            near = ((groups - middle).abs_().amin(1, True) > reach).logical_not_()
            task, _, place = near.nonzero(as_tuple=True)
            above = groups[task, :, place].view(bits) - low[task, None]
            inside = (above >= 0) & (above <= (high - low)[task, None])
            bins = ((above >> shift) + offsets[task, None])[inside]
            fewer = groups.lt_(first).sum(1).sum(1, dtype=torch.int64)
            with lock:
                counts.view(-1).index_add_(0, bins, torch.ones_like(bins))
                below.add_(fewer)

    deque(updates.side_by_side(count, names), maxlen=0)
    return below, counts, shift
