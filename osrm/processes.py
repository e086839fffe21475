"""The processes of one run, as accelerate or torchrun started them; they share one file system.

In a single process every function returns at once.
"""

from __future__ import annotations

from typing import Any, TypeVar

Value = TypeVar("Value")


def _distributed() -> Any:
    import torch.distributed as dist  # late: `osrm.embedded` need not wait for torch

    return dist


def count() -> int:
    """The number of processes."""
    dist = _distributed()
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return _distributed().get_rank() if count() > 1 else 0


def is_first() -> bool:
    """Whether this process writes the files and reports."""
    return rank() == 0


def barrier() -> None:
    """Wait for all processes."""
    if count() > 1:
        _distributed().barrier()


def of_first(value: Value) -> Value:
    """The first process's value, in all processes."""
    values = [value]
    if count() > 1:
        _distributed().broadcast_object_list(values)
    return values[0]


def gathered(value: Value) -> list[Value]:
    """The values of all processes, in the order of their numbers."""
    values: list[Any] = [value] * count()
    if count() > 1:
        _distributed().all_gather_object(values, value)
    return values
