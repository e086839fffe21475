"""Merging methods: which update does each task receive? One method a file, one row each."""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from osrm.errors import UserError
from osrm.merging._updates import LazyUpdates, Updates
from osrm.merging.average import average
from osrm.merging.emr import emr
from osrm.merging.task_arithmetic import task_arithmetic
from osrm.merging.ties import ties

__all__ = ["METHODS", "LazyUpdates", "Method", "Updates", "check_knobs", "merge"]


@dataclass(frozen=True)
class Method:
    """One row of `METHODS`."""

    name: str
    kernel: Callable[..., Updates]
    """`kernel(updates, **knobs)`: float32 updates in; out, the update that each task receives.

    A knob named `scale` is λ, and the result is linear in it: λ times that of scale = 1. The
    search for λ relies on this.
    """
    paper: str

    @property
    def knobs(self) -> tuple[str, ...]:
        """The kernel's keywords."""
        return tuple(inspect.signature(self.kernel).parameters)[1:]


METHODS = {
    method.name: method
    for method in (
        Method("average", average, "https://arxiv.org/abs/2203.05482"),
        Method("task_arithmetic", task_arithmetic, "https://arxiv.org/abs/2212.04089"),
        Method("ties", ties, "https://arxiv.org/abs/2306.01708"),
        Method("emr", emr, "https://arxiv.org/abs/2405.17461"),
    )
}

RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "scale": ("a finite number", lambda scale: abs(scale) < math.inf),
    "density": ("a number in (0, 1]", lambda density: 0 < density <= 1),
}
"""Knob -> what its value must be: in words, and as a test of a number."""


def merge(name: str, updates: Updates, /, **knobs: Any) -> Updates:
    """The update that each task receives from the method `name`, computed in float32.

    Statistics over all modules are taken at once, in passes over `updates`; a module is merged
    anew at each look-up. Rows are the tasks, in the order of `updates`. What all tasks share comes
    back as an expanded view: copy it before writing into it.

    Raises:
        UserError: see `check_knobs`; or there is no module to merge.
    """
    check_knobs(name, knobs)
    if not updates:
        raise UserError("nothing to merge: no module has an update")
    in_float32 = LazyUpdates(updates, lambda module: updates[module].float())
    # JSON may write 1.0 as 1.
    knobs |= {knob: float(knobs[knob]) for knob in RANGES.keys() & knobs.keys()}
    return METHODS[name].kernel(in_float32, **knobs)


def check_knobs(name: str, knobs: Mapping[str, object]) -> None:
    """Is there such a method, and does it take these knobs with these values?

    Raises:
        UserError: one line with everything that is wrong.
    """
    if name not in METHODS:
        raise UserError(f"unknown merging method {name!r}: choose one of {', '.join(METHODS)}")
    known = METHODS[name].knobs
    problems = []
    for knob, value in knobs.items():
        if knob not in known:
            problems.append(f"unknown knob {knob!r} (known: {', '.join(known) or 'none'})")
        elif knob in RANGES:
            wanted, holds = RANGES[knob]
            if not (is_number(value) and holds(value)):
                problems.append(f"{knob} must be {wanted}, not {value!r}")
    if problems:
        raise UserError(f"merging method {name!r}: {'; '.join(problems)}")


def is_number(value: object) -> TypeGuard[float]:
    """True and False are no numbers here."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)
