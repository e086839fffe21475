"""Merging methods: which update does each task receive? One method a file and a row each."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from osrm.checks import Check, number, one_of, problems, whole
from osrm.errors import UserError
from osrm.merging._updates import Inputs, Masked, Part, Updates, Weighted, row
from osrm.merging.average import average
from osrm.merging.core_space import core_space
from osrm.merging.dare import dare_linear, dare_ties
from osrm.merging.emr import emr
from osrm.merging.fisher import fisher
from osrm.merging.iso_c import iso_c
from osrm.merging.iso_cts import iso_cts
from osrm.merging.knots_ties import knots_ties
from osrm.merging.regmean import regmean
from osrm.merging.task_arithmetic import task_arithmetic
from osrm.merging.ties import ties
from osrm.merging.tsv import tsv
from osrm.task_vectors import Lazy


def _are_weights(value: object) -> bool:
    return value is None or (isinstance(value, list | tuple) and all(map(number().holds, value)))


WEIGHTS = Check("finite numbers, one for each task", _are_weights)


@dataclass(frozen=True)
class Method:
    """One row of `METHODS`."""

    kernel: Callable[..., Mapping[str, Part]]
    """`kernel(updates, **knobs)`, or `kernel(updates, statistics, **knobs)` if it needs some. The
    search for λ wants a knob `scale` to be λ: the result is λ times that of scale = 1."""
    paper: str
    needs: str = ""
    """The statistics that it needs beside the updates: "moments" or "fisher"."""
    weights: Check | None = WEIGHTS
    """What the tasks' weights must be, if they may have some. A knob `weights` of the kernel has
    those of a mean; other kernels get the updates times their weights."""

    @property
    def own_knobs(self) -> tuple[str, ...]:
        """The kernel's keywords."""
        return tuple(inspect.signature(self.kernel).parameters)[1 + bool(self.needs) :]

    @property
    def knobs(self) -> tuple[str, ...]:
        """All that it can be given."""
        return tuple(dict.fromkeys([*self.own_knobs, *["weights"] * bool(self.weights)]))


SHARES = Check(
    "numbers of at least 0, not all of them 0, one for each task",
    lambda value: WEIGHTS.holds(value) and (not value or min(value) >= 0 < max(value)),
)
METHODS = {
    "average": Method(average, "https://arxiv.org/abs/2203.05482"),
    "task_arithmetic": Method(task_arithmetic, "https://arxiv.org/abs/2212.04089"),
    "ties": Method(ties, "https://arxiv.org/abs/2306.01708"),
    "dare_linear": Method(dare_linear, "https://arxiv.org/abs/2311.03099"),
    "dare_ties": Method(dare_ties, "https://arxiv.org/abs/2311.03099"),
    "emr": Method(emr, "https://arxiv.org/abs/2405.17461", weights=None),
    "fisher": Method(fisher, "https://arxiv.org/abs/2111.09832", needs="fisher", weights=SHARES),
    "regmean": Method(regmean, "https://arxiv.org/abs/2212.09849", needs="moments", weights=SHARES),
    "knots_ties": Method(knots_ties, "https://arxiv.org/abs/2410.19735"),
    "core_space": Method(core_space, "https://arxiv.org/abs/2509.17786"),
    "tsv": Method(tsv, "https://arxiv.org/abs/2412.00081"),
    "iso_c": Method(iso_c, "https://arxiv.org/abs/2502.04959"),
    "iso_cts": Method(iso_cts, "https://arxiv.org/abs/2502.04959"),
}

NUMBERS = {
    "common": number(0, 1),
    "density": number(0, 1, low_open=True),
    "drop_rate": number(0, 1, high_open=True),
    "off_diagonal": number(0, 1),
    "ridge": number(0),
    "scale": number(),
}


CHECKS = NUMBERS | {
    "inner": one_of("ties", "task_arithmetic", "tsv"),
    "seed": whole(),
    "trim": one_of("global", "tensor"),
}
"""Knob -> what its value must be."""


class Merged(Lazy[Tensor]):
    """What each task receives: module -> stack (task, out, in), made anew at each look-up. An
    update that all tasks share comes as an expanded view: copy it before writing into it."""

    def __init__(
        self, parts: Mapping[str, Part], tasks: Sequence[str], calls: Callable[..., Any] = map
    ) -> None:
        """`calls(function, modules)` calls the function for each module, maybe side by side."""
        super().__init__(parts, self._stack)
        self.parts, self.tasks, self.calls = parts, tuple(tasks), calls

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
    *,
    device: torch.device | str = "cpu",
    **knobs: Any,
) -> Merged:
    """The update that each task receives from the method `name`, computed in float32 or float64.

    It is computed on `device`, where `statistics` are too, one module at a time.

    What a method needs to know of all modules is computed here, in passes over `updates`; a module
    is merged anew at each look-up. The factors of `TaskVectors` are never all dense at a time.
    `statistics` is what the method needs beside the updates, by module: see its docstring.
    """
    check_knobs(name, knobs)
    method = METHODS[name]
    if not updates:
        raise UserError("nothing to merge: no module has an update")
    if method.needs and statistics is None:
        raise UserError(f"merging method {name!r}: it needs {method.needs} as statistics")
    # JSON may write 1.0 as 1.
    knobs |= {knob: float(knobs[knob]) for knob in NUMBERS if knob in knobs}
    inputs = Inputs(updates, dtype, device=device)
    weights = knobs.get("weights")
    if weights is not None and len(weights) != len(inputs.tasks):
        raise UserError(f"weights: {len(weights)} of them for {len(inputs.tasks)} tasks")
    if weights is not None and "weights" not in method.own_knobs:
        inputs = Weighted(inputs, knobs.pop("weights"))
    needed = [statistics] if method.needs else []
    # A method that looks at data has a module's d × d statistics in memory.
    calls = map if method.needs else inputs.side_by_side
    return Merged(method.kernel(inputs, *needed, **knobs), inputs.tasks, calls)


def check_knobs(name: str, knobs: Mapping[str, object]) -> None:
    """Refuse an unknown method, and in one line all unknown knobs and wrong values."""
    if name not in METHODS:
        raise UserError(f"unknown merging method {name!r}: choose one of {', '.join(METHODS)}")
    known = METHODS[name].knobs
    choices = ", ".join(known)
    wrong = [f"unknown knob {knob!r} (known: {choices})" for knob in knobs if knob not in known]
    checks = {**CHECKS, "weights": METHODS[name].weights or WEIGHTS}
    wrong += problems({knob: knobs[knob] for knob in known if knob in knobs}, checks)
    if wrong:
        raise UserError(f"merging method {name!r}: {'; '.join(wrong)}")
