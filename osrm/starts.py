"""The starts of A: a table of short functions from the tasks' statistics to A (rank, d)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from osrm.moments import Moment
from osrm.subspace import contrastive_subspace, minor_subspace, random_frame


@dataclass(frozen=True)
class Problem:
    """What a start may look at: one layer's width d, and the statistics of its inputs."""

    d: int
    rank: int
    own: Moment | None
    others: Moment | None
    epsilon: float


@dataclass(frozen=True)
class Start:
    """A row of the table; `needs_features` says whether it looks at own and others."""

    name: str
    draw: Callable[[Problem, Generator], Tensor]
    needs_features: bool
    summary: str


def gaussian(problem: Problem, generator: Generator) -> Float[Tensor, "rank d"]:
    """PEFT's `init_lora_weights="gaussian"`: entries N(0, 1/rank²), so rows of norm √d / rank."""
    return torch.randn(problem.rank, problem.d, generator=generator) / problem.rank


def kaiming(problem: Problem, generator: Generator) -> Float[Tensor, "rank d"]:
    """PEFT's default: entries uniform in ±1/√d (Kaiming with a = √5), so rows of norm 1/√3."""
    uniform = torch.rand(problem.rank, problem.d, generator=generator)
    return (2 * uniform - 1) / problem.d**0.5


def orthogonal(problem: Problem, generator: Generator) -> Float[Tensor, "rank d"]:
    """A random frame: OSRM's norms without its choice of directions."""
    return random_frame(problem.d, problem.rank, generator)


def analytical(problem: Problem, generator: Generator) -> Float[Tensor, "rank d"]:
    """OSRM's closed form: the least energy of the other tasks (paper, Sec. 4)."""
    assert problem.others is not None
    return minor_subspace(problem.others, problem.rank, generator)


def contrastive(problem: Problem, generator: Generator) -> Float[Tensor, "rank d"]:
    """Ours: of the directions of little other-task energy those of most own energy."""
    assert problem.own is not None and problem.others is not None
    return contrastive_subspace(
        problem.own, problem.others, problem.rank, generator, problem.epsilon
    )


def release(problem: Problem, generator: Generator) -> Float[Tensor, "rank d"]:
    """The published code's, as a baseline: the last right singular vectors that LAPACK returns.

    On fewer rows than d (--features mean --count-padding is its statistic) these are an arbitrary
    frame of the null space, nearly the same for all tasks: what `analytical` draws with care.
    """
    assert problem.others is not None
    return torch.linalg.svd(problem.others.data).Vh[-problem.rank :]


STARTS = {
    row.name: row
    for row in (
        Start("gaussian", gaussian, False, "PEFT's gaussian"),
        Start("kaiming", kaiming, False, "PEFT's default, Kaiming uniform"),
        Start("orthogonal", orthogonal, False, "a random frame for each task"),
        Start("analytical", analytical, True, "OSRM: least energy of the other tasks"),
        Start("contrastive", contrastive, True, "most own energy against that of the others"),
        Start("release", release, True, "the published code's singular vectors, as a baseline"),
    )
}


def draw(
    name: str, problem: Problem, generator: Generator, norm: float | None = None
) -> Float[Tensor, "rank d"]:
    """A in float32 from the start of that name; with `norm` each row is rescaled to that norm.

    Raises:
        ValueError: the rank is not in 1..d, or a statistic is not finite.
    """
    if not 1 <= problem.rank <= problem.d:
        raise ValueError(f"rank {problem.rank} is not in 1..{problem.d}")
    A = STARTS[name].draw(problem, generator)
    if norm is not None:
        A = torch.nn.functional.normalize(A, dim=1) * norm
    return A.to(torch.float32)
