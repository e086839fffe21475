"""Updates as values: a LoRA pair, and the stack of all tasks' updates of the same modules."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from osrm.errors import UserError

Factors = tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]
"""(B, A) with B A = ΔW."""
Device = torch.device | str | None
"""A device; None: where the tensor is."""


@dataclass(frozen=True, eq=False)
class LoraPair:
    """The update ΔW = scaling · B A of one linear layer, as factors of any float type."""

    A: Float[Tensor, "rank in"]
    B: Float[Tensor, "out rank"]
    scaling: float
    """alpha / rank"""

    @property
    def delta(self) -> Float[Tensor, "out in"]:
        """ΔW in float32."""
        return self.dense(torch.float32)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of ΔW."""
        return len(self.B), self.A.shape[1]

    def dense(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """ΔW, computed in this type."""
        return (self.B.to(dtype) @ self.A.to(dtype)).mul_(self.scaling)

    def factors(self, dtype: torch.dtype) -> Factors:
        """(scaling · B, A) in this type."""
        return self.scaling * self.B.to(dtype), self.A.to(dtype)

    def to(self, device: Device) -> LoraPair:
        """The pair in the memory of this device."""
        return LoraPair(self.A.to(device), self.B.to(device), self.scaling)

    def scaled(self, weight: float) -> LoraPair:
        """The pair of weight · ΔW."""
        return LoraPair(self.A, self.B, weight * self.scaling)

    @classmethod
    def project(
        cls, delta: Float[Tensor, "out in"], A: Float[Tensor, "rank in"], scaling: float
    ) -> LoraPair:
        """The float32 pair with this A whose update is nearest to `delta`: B = ΔW A⁺ / scaling.

        The part of ΔW outside the row space of A is lost; B is the smallest minimiser.
        """
        A = A.float()
        return cls(A, delta.float() @ torch.linalg.pinv(A) / scaling, scaling)


Update = LoraPair | Tensor | Callable[[], Tensor]
"""One module's update: factors, dense, or a function that reads it dense, such as the difference
of two checkpoints."""

Value = TypeVar("Value")


class Lazy(Mapping[str, Value]):
    """The mapping from each name to `compute(name)`, which runs at every look-up."""

    def __init__(self, names: Collection[str], compute: Callable[[str], Value]) -> None:
        self._names, self._compute = names, compute

    def __getitem__(self, name: str) -> Value:
        return self._compute(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class TaskVectors(Lazy[Tensor]):
    """All tasks' updates of the same modules: module name -> float32 stack (task, out, in).

    Updates stay as they came; each look-up makes one module's dense stack anew. `stack` sorts the
    modules; rows are in the order of `tasks`.
    """

    def __init__(self, tasks: tuple[str, ...], updates: Mapping[str, tuple[Update, ...]]) -> None:
        super().__init__(updates, lambda name: torch.stack([*map(dense, updates[name])]))
        self.tasks, self.updates = tasks, updates

    @classmethod
    def stack(cls, tasks: Mapping[str, Mapping[str, Update]]) -> TaskVectors:
        """The stack of {task: {module: update}}; a task's update of a module it lacks is zero.

        One `UserError` names the first five updates that are no finite matrix of the same shape.
        """
        shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
        problems = [] if any(tasks.values()) else ["nothing to stack: no task updates a module"]
        for task, updates in tasks.items():
            for name, update in updates.items():
                shape, finite = _examine(update)
                owner, expected = shapes.setdefault(name, (task, shape))
                where = f"task {task!r}, module {name!r}: "
                if len(shape) != 2:
                    problems.append(f"{where}not a matrix but {shape}")
                elif shape != expected:
                    shown = f"{expected} in task {owner!r} but {shape} in task {task!r}"
                    problems.append(f"module {name!r} is {shown}")
                elif not finite:
                    problems.append(f"{where}the update holds NaN or infinity")
        if problems:
            more = [f"and {len(problems) - 5} more"] if len(problems) > 5 else []
            raise UserError("; ".join([*problems[:5], *more]))
        stacked = {}
        for name, (_, (out, width)) in sorted(shapes.items()):
            zero = LoraPair(torch.zeros(0, width), torch.zeros(out, 0), 1.0)
            stacked[name] = tuple(updates.get(name, zero) for updates in tasks.values())
        return cls(tuple(tasks), stacked)

    def pairs(self, name: str) -> tuple[LoraPair, ...]:
        """The tasks' factors; none if an update is dense."""
        pairs = tuple(update for update in self.updates[name] if isinstance(update, LoraPair))
        return pairs if len(pairs) == len(self.tasks) else ()


@torch.no_grad()
def dense(update: Update, device: Device = None) -> Tensor:
    """The update in float32, where it is or on this device."""
    if isinstance(update, LoraPair):
        return update.to(device).delta
    return (update if isinstance(update, Tensor) else update()).to(device).float()


def on(device: Device, update: Update) -> LoraPair | Tensor:
    """The update on this device: a pair as it is, any other dense in float32."""
    return update.to(device) if isinstance(update, LoraPair) else dense(update, device)


def deltas(updates: Mapping[str, Update], device: Device = None) -> Lazy[Tensor]:
    """The updates in float32, each made dense when it is looked up; see `dense`."""
    return Lazy(updates, lambda name: dense(updates[name], device))


@torch.no_grad()
def _examine(update: Update) -> tuple[tuple[int, ...], bool]:
    """Its shape, and whether it is finite; factors are multiplied only if a bound is too large."""
    if isinstance(update, LoraPair):
        A, B = (float(M.abs().max()) if M.numel() else 0.0 for M in (update.A, update.B))
        if abs(update.scaling) * len(update.A) * A * B < torch.finfo(torch.float32).max:
            return update.shape, True
    delta = dense(update)
    return tuple(delta.shape), bool(delta.isfinite().all())
