"""The starts of A: a table of functions from the tasks' statistics to A (rank, d)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from osrm.config import EPSILON
from osrm.moments import Moment, own_and_others
from osrm.seeds import derive_seed
from osrm.subspace import contrastive_subspace, minor_subspace, random_frame


@dataclass(frozen=True)
class Problem:
    """What a start may use: one layer's width d, the rank, the statistics of its inputs."""

    d: int
    rank: int
    own: Moment | None
    others: Moment | None
    epsilon: float


@dataclass(frozen=True)
class Start:
    """A row of the table."""

    name: str
    draw: Callable[[Problem, Generator], Tensor]
    needs_features: bool
    summary: str


def gaussian(problem: Problem, generator: Generator) -> Float[Tensor, "rank d"]:
    """PEFT's `init_lora_weights="gaussian"`: entries N(0, 1/rank²), so rows of norm √d / rank."""
    return torch.randn(problem.rank, problem.d, generator=generator) / problem.rank


def kaiming(problem: Problem, generator: Generator) -> Float[Tensor, "rank d"]:
    """PEFT's default: entries uniform in ±1/√d (Kaiming with a = √5), so rows of norm 1/√3."""
    return (2 * torch.rand(problem.rank, problem.d, generator=generator) - 1) / problem.d**0.5


def orthogonal(problem: Problem, generator: Generator) -> Float[Tensor, "rank d"]:
    """A random frame: OSRM's norms without its choice of directions."""
    return random_frame(problem.d, problem.rank, generator)


def analytical(problem: Problem, generator: Generator) -> Float[Tensor, "rank d"]:
    """OSRM's closed form: the least energy of the other tasks (paper, Sec. 4)."""
    assert problem.others is not None
    return minor_subspace(problem.others, problem.rank, generator)


def contrastive(problem: Problem, generator: Generator) -> Float[Tensor, "rank d"]:
    """Ours: of the directions of little other-task energy those of most own energy."""
    own, others, epsilon = problem.own, problem.others, problem.epsilon
    assert own is not None and others is not None
    return contrastive_subspace(own, others, problem.rank, generator, epsilon=epsilon)


def release(problem: Problem, generator: Generator) -> Float[Tensor, "rank d"]:
    """The published code's, as a baseline: the last right singular vectors that LAPACK returns.

    Its statistic is --features mean --count-padding. If that has fewer rows than d, these vectors
    are an arbitrary frame of the null space, nearly the same for all tasks.
    """
    assert problem.others is not None
    return torch.linalg.svd(problem.others.data).Vh[-problem.rank :]


_ROWS = (
    Start("gaussian", gaussian, False, "PEFT's gaussian"),
    Start("kaiming", kaiming, False, "PEFT's default, Kaiming uniform"),
    Start("orthogonal", orthogonal, False, "a random frame for each task"),
    Start("analytical", analytical, True, "OSRM: least energy of the other tasks"),
    Start("contrastive", contrastive, True, "most own energy against that of the others"),
    Start("release", release, True, "the published code's singular vectors, as a baseline"),
)
STARTS = {row.name: row for row in _ROWS}


def draw(
    name: str, problem: Problem, generator: Generator, norm: float | None = None
) -> Float[Tensor, "rank d"]:
    """A in float32 on the CPU, its rows of that norm; ValueError on a rank not in 1..d, or NaN."""
    if not 1 <= problem.rank <= problem.d:
        raise ValueError(f"rank {problem.rank} is not in 1..{problem.d}")
    A = STARTS[name].draw(problem, generator)
    if norm is not None:
        A = torch.nn.functional.normalize(A, dim=1) * norm
    return A.to("cpu", torch.float32)


@dataclass(frozen=True)
class StartConfig:
    """How A begins: a start of `STARTS`, and what all modules and tasks share.

    `epsilon` is that of `contrastive_subspace`, `norm` that of every row of A (None: the start's
    own). All that is random depends on `seed`, the task and the module.
    """

    init: str
    epsilon: float = EPSILON
    norm: float | None = None
    seed: int = 0


def starts(
    config: StartConfig,
    layers: Mapping[str, tuple[int, int]],
    tasks: Collection[str],
    *,
    features: Mapping[str, Mapping[str, Moment]],
    leaders: Mapping[str, str],
    others: Collection[str],
) -> dict[str, dict[str, Float[Tensor, "rank d"]]]:
    """{task: {module: A}}; one layer's statistics are in memory at a time, on their device.

    If the start looks at features, modules of one rank that read one input share one A; otherwise
    each has its own, as in PEFT.

    Args:
        layers: {module: (rank of its A, number d of its input features)}.
        features: {task: {module: statistic}} of `tasks` and `others`; empty if not needed.
        leaders: {module: the first module that reads the same input}, as in `recorded_inputs`.
        others: the tasks to avoid; a task never avoids itself.
    """
    factors: dict[str, dict[str, Tensor]] = {task: {} for task in tasks}
    groups: dict[tuple[str, int], list[str]] = {}
    for module, (rank, _) in layers.items():
        groups.setdefault((leaders[module] if features else module, rank), []).append(module)
    for (_, rank), members in groups.items():
        first = members[0]  # not the leader: a bank may hold more layers than we adapt
        moments = {task: file[first] for task, file in features.items()}
        for task, own, other in own_and_others(moments, tasks, others):
            generator = torch.Generator().manual_seed(derive_seed(config.seed, task, "A", first))
            problem = Problem(layers[first][1], rank, own, other, config.epsilon)
            A = draw(config.init, problem, generator, config.norm)
            factors[task].update(dict.fromkeys(members, A))
    return factors
