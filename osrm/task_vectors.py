"""Updates as values: a LoRA pair, and the stack of all tasks' updates of the same modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from osrm.errors import UserError


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
        return self.scaling * (self.B.float() @ self.A.float())

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of ΔW."""
        return len(self.B), self.A.shape[1]

    @classmethod
    def project(
        cls, delta: Float[Tensor, "out in"], A: Float[Tensor, "rank in"], scaling: float
    ) -> LoraPair:
        """The pair with this A whose update is nearest to `delta`: B = ΔW A⁺ / scaling.

        It attains the minimum of ‖ΔW - scaling · B A‖_F over B: what is left is the part of ΔW
        outside the row space of A. For orthonormal rows A⁺ = Aᵀ. B is unique if A has full row
        rank, and the smallest one otherwise. The pair is float32; scaling must not be zero.
        """
        A = A.float()
        return cls(A, delta.float() @ torch.linalg.pinv(A) / scaling, scaling)


Update = LoraPair | Tensor | Callable[[], Tensor]
"""One module's update: factors, dense, or a function that fetches it dense, such as the difference
of two checkpoints read one module at a time."""


@dataclass(frozen=True, eq=False)
class TaskVectors(Mapping[str, Tensor]):
    """All tasks' updates of the same modules: module name -> float32 stack (task, out, in).

    Updates stay as they came; each look-up makes one module's dense stack anew. Modules iterate
    in sorted order, rows are in the order of `tasks`. Build it with `stack`.
    """

    tasks: tuple[str, ...]
    updates: dict[str, tuple[Update, ...]]

    @classmethod
    def stack(cls, tasks: Mapping[str, Mapping[str, Update]]) -> TaskVectors:
        """The stack of {task: {module: update}}; a task's update of a module it lacks is zero.

        Raises:
            UserError: there are no tasks or no modules; shapes differ or are no matrices; an
                update holds NaN or infinity. One line with all.
        """
        shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
        problems = list(find_problems(tasks, shapes))
        if problems:
            raise UserError(listed(problems, "; "))
        updates = {}
        for name in sorted(shapes):
            out, width = shapes[name][1]
            zero = LoraPair(torch.zeros(0, width), torch.zeros(out, 0), 1.0)
            updates[name] = tuple(each.get(name, zero) for each in tasks.values())
        return cls(tuple(tasks), updates)

    def pairs(self, name: str) -> tuple[LoraPair, ...]:
        """The tasks' factors; none if an update is dense."""
        found = tuple(each for each in self.updates[name] if isinstance(each, LoraPair))
        return found if len(found) == len(self.tasks) else ()

    def __getitem__(self, name: str) -> Float[Tensor, "task out in"]:
        return torch.stack([dense(update) for update in self.updates[name]])

    def __contains__(self, name: object) -> bool:
        return name in self.updates

    def __iter__(self) -> Iterator[str]:
        return iter(self.updates)

    def __len__(self) -> int:
        return len(self.updates)


@torch.no_grad()
def dense(update: Update) -> Tensor:
    """The update in float32."""
    if isinstance(update, LoraPair):
        return update.delta
    return (update if isinstance(update, Tensor) else update()).float()


def find_problems(
    tasks: Mapping[str, Mapping[str, Update]], shapes: dict[str, tuple[str, tuple[int, ...]]]
) -> Iterator[str]:
    """Why these updates cannot be stacked; notes in `shapes` the first task and shape of each."""
    if not any(tasks.values()):
        yield "nothing to stack: no task updates a module"
    for task, updates in tasks.items():
        for name, update in updates.items():
            shape, finite = _examined(update)
            owner, expected = shapes.setdefault(name, (task, shape))
            if len(shape) != 2:
                yield f"task {task!r}, module {name!r}: not a matrix but {shape}"
            elif shape != expected:
                yield (
                    f"module {name!r} is {expected} in task {owner!r} but {shape} in task {task!r}"
                )
            elif not finite:
                yield f"task {task!r}, module {name!r}: the update holds NaN or infinity"


@torch.no_grad()
def _examined(update: Update) -> tuple[tuple[int, ...], bool]:
    """Its shape, and whether it is finite; factors are multiplied only if that decides it."""
    if isinstance(update, LoraPair):
        peaks = [float(each.abs().max()) if each.numel() else 0.0 for each in (update.A, update.B)]
        bound = abs(update.scaling) * len(update.A) * peaks[0] * peaks[1]
        if bound < torch.finfo(torch.float32).max:
            return update.shape, True
    delta = dense(update)
    return tuple(delta.shape), bool(delta.isfinite().all())


def listed(items: Sequence[str], separator: str, most: int = 5) -> str:
    """The first few items, and how many more there are."""
    more = [f"and {len(items) - most} more"] if len(items) > most else []
    return separator.join([*items[:most], *more])
