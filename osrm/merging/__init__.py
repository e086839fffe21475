"""Merging methods: which update does each task receive? One method a file, one row each."""

import inspect
import reprlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from jaxtyping import Float
from torch import Tensor

from osrm.errors import UserError
from osrm.merging._updates import Inputs, Lazy, Masked, Part, Updates, row
from osrm.merging.average import average
from osrm.merging.core_space import INNER, core_space
from osrm.merging.dare import dare_linear, dare_ties
from osrm.merging.emr import emr
from osrm.merging.fisher import fisher
from osrm.merging.iso_c import iso_c
from osrm.merging.knots_ties import knots_ties
from osrm.merging.regmean import regmean
from osrm.merging.task_arithmetic import task_arithmetic
from osrm.merging.ties import TRIMS, ties
from osrm.merging.tsv import tsv

__all__ = [
    "METHODS",
    "Inputs",
    "Lazy",
    "Masked",
    "Merged",
    "Method",
    "Part",
    "Updates",
    "check_knobs",
    "merge",
    "row",
]


@dataclass(frozen=True)
class Method:
    """One row of `METHODS`."""

    name: str
    kernel: Callable[..., Mapping[str, Part]]
    """`kernel(updates, **knobs)`, or `kernel(updates, statistics, **knobs)` if it needs some.

    A knob named `scale` is λ, and the result is linear in it: λ times that of scale = 1. The
    search for λ relies on this.
    """
    paper: str
    needs: str = ""
    """The statistics that it needs beside the updates: "moments" or "fisher"."""

    @property
    def knobs(self) -> tuple[str, ...]:
        """The kernel's keywords."""
        return tuple(inspect.signature(self.kernel).parameters)[1 + bool(self.needs) :]


METHODS = {
    method.name: method
    for method in (
        Method("average", average, "https://arxiv.org/abs/2203.05482"),
        Method("task_arithmetic", task_arithmetic, "https://arxiv.org/abs/2212.04089"),
        Method("ties", ties, "https://arxiv.org/abs/2306.01708"),
        Method("dare_linear", dare_linear, "https://arxiv.org/abs/2311.03099"),
        Method("dare_ties", dare_ties, "https://arxiv.org/abs/2311.03099"),
        Method("emr", emr, "https://arxiv.org/abs/2405.17461"),
        Method("fisher", fisher, "https://arxiv.org/abs/2111.09832", needs="fisher"),
        Method("regmean", regmean, "https://arxiv.org/abs/2212.09849", needs="moments"),
        Method("knots_ties", knots_ties, "https://arxiv.org/abs/2410.19735"),
        Method("core_space", core_space, "https://arxiv.org/abs/2509.17786"),
        Method("tsv", tsv, "https://arxiv.org/abs/2412.00081"),
        Method("iso_c", iso_c, "https://arxiv.org/abs/2502.04959"),
    )
}


def _is_number(value: object) -> TypeGuard[float]:
    """Finite, also as a float; True and False are no numbers here."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return bool(abs(value) <= sys.float_info.max)


def _number(holds: Callable[[float], bool]) -> Callable[[object], bool]:
    return lambda value: _is_number(value) and holds(value)


def _are_weights(value: object) -> bool:
    if not isinstance(value, list | tuple):
        return value is None
    return all(map(_is_number, value))


RANGES: dict[str, tuple[str, Callable[[object], bool]]] = {
    "scale": ("a finite number", _number(lambda scale: True)),
    "density": ("a number in (0, 1]", _number(lambda density: 0 < density <= 1)),
    "drop_rate": ("a number in [0, 1)", _number(lambda rate: 0 <= rate < 1)),
    "seed": ("a whole number", lambda seed: _is_number(seed) and isinstance(seed, int)),
    "ridge": ("a finite number, 0 or more", _number(lambda ridge: ridge >= 0)),
    "off_diagonal": ("a number in [0, 1]", _number(lambda ratio: 0 <= ratio <= 1)),
    "weights": ("finite numbers, one a task", _are_weights),
    "trim": (f"one of {', '.join(TRIMS)}", lambda trim: trim in TRIMS),
    "inner": (f"one of {', '.join(INNER)}", lambda inner: inner in INNER),
}
"""Knob -> what its value must be: in words, and as a test."""


FRACTIONS = ("scale", "density", "drop_rate", "ridge", "off_diagonal")
"""The knobs that are numbers, whole or not."""


class Merged(Lazy[Tensor]):
    """What each task receives: module -> stack (task, out, in), made anew at each look-up.

    What all tasks share comes as an expanded view: copy it before writing into it.
    """

    def __init__(self, parts: Mapping[str, Part], tasks: Sequence[str]) -> None:
        super().__init__(parts, self._stack)
        self.parts, self.tasks = parts, tuple(tasks)

    def _stack(self, name: str) -> Float[Tensor, "task out in"]:
        part = self.parts[name]
        if isinstance(part, Masked) or (isinstance(part, Tensor) and part.ndim == 3):
            return torch.stack([row(part, task) for task in range(len(self.tasks))])
        delta = row(part, 0)
        return delta.expand(len(self.tasks), *delta.shape)


def merge(
    name: str,
    updates: Updates,
    /,
    statistics: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    **knobs: Any,
) -> Merged:
    """The update that each task receives from the method `name`, computed in `dtype`.

    Statistics over all modules are taken at once, in passes over `updates`; a module is merged
    anew at each look-up. Tasks are in the order of `updates`: a `TaskVectors`, whose factors are
    never all dense at a time, or a mapping of dense stacks.

    Args:
        statistics: what the method needs beside the updates, by module: see its own docstring.
        dtype: torch.float32 or torch.float64.

    Raises:
        UserError: see `check_knobs`; there is no module to merge; the statistics are lacking.
    """
    check_knobs(name, knobs)
    method = METHODS[name]
    if not updates:
        raise UserError("nothing to merge: no module has an update")
    if method.needs and statistics is None:
        raise UserError(f"merging method {name!r}: it needs {method.needs} as statistics")
    # JSON may write 1.0 as 1.
    knobs |= {knob: float(knobs[knob]) for knob in FRACTIONS if knob in knobs}
    inputs = Inputs(updates, dtype)
    weights = knobs.get("weights")
    if weights is not None and len(weights) != len(inputs.tasks):
        raise UserError(f"weights: {len(weights)} of them for {len(inputs.tasks)} tasks")
    needed = [statistics] if method.needs else []
    return Merged(method.kernel(inputs, *needed, **knobs), inputs.tasks)


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
            if not holds(value):
                problems.append(f"{knob} must be {wanted}, not {reprlib.repr(value)}")
    if problems:
        raise UserError(f"merging method {name!r}: {'; '.join(problems)}")
