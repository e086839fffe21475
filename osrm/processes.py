"""The processes of one run, if accelerate or torchrun started several: who writes, what is shared.

All of them see one file system. Without several processes nothing here does anything.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch.distributed as dist

Value = TypeVar("Value")


def count() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this one, from 0."""
    return dist.get_rank() if count() > 1 else 0


def is_first() -> bool:
    """Whether this process is the one that writes and reports."""
    return rank() == 0


def barrier() -> None:
    """Wait for all."""
    if count() > 1:
        dist.barrier()


def of_first(value: Value) -> Value:
    """The first process's value, in all of them."""
    values = [value]
    if count() > 1:
        dist.broadcast_object_list(values)
    return values[0]


def gathered(value: Value) -> list[Value]:
    """The value of every process, in their order."""
    values: list[Any] = [value]
    if count() > 1:
        values = [None] * count()
        dist.all_gather_object(values, value)
    return values
