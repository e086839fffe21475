"""Every row of the table of starts: what all share, and what each is by definition."""

import dataclasses

import numpy as np
import pytest
import scipy.stats
import torch
from peft import LoraConfig, get_peft_model
from torch import Generator, nn

from osrm.config import TrainConfig
from osrm.moments import Moment
from osrm.runs import needs_features, run_name
from osrm.starts import STARTS, Problem, Start, StartConfig, draw, starts
from osrm.subspace import contrastive_subspace, minor_subspace, random_frame

D, RANK = 32, 4
ORTHONORMAL = ["orthogonal", "analytical", "contrastive"]
"""The others are PEFT's own."""


def generator(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def inputs(seed: int, n: int = 100) -> torch.Tensor:
    return torch.randn(n, D, generator=generator(seed)) * torch.logspace(-2, 0, D) + seed


def problem(rank: int = RANK, epsilon: float = 1e-2, n: int = 100) -> Problem:
    return Problem(D, rank, Moment.of(inputs(1, n)), Moment.of(inputs(2, n)), epsilon)


# -- what all starts share ---------------------------------------------------------------------


@pytest.mark.parametrize("n", [3, 100])
@pytest.mark.parametrize("rank", [1, RANK, D])
@pytest.mark.parametrize("name", STARTS)
def test_every_start_gives_one_row_a_rank_in_float32(name, rank, n):
    A = draw(name, problem(rank, n=n), generator())
    assert A.shape == (rank, D) and A.dtype == torch.float32
    assert A.isfinite().all() and torch.linalg.matrix_rank(A) == rank


@pytest.mark.parametrize("name", STARTS)
def test_a_start_depends_on_problem_and_generator_alone(name):
    torch.manual_seed(0)
    first = draw(name, problem(), generator(1))
    torch.manual_seed(1)
    assert torch.equal(first, draw(name, problem(), generator(1)))
    # A few vectors leave a choice to every start; the release leaves it to LAPACK.
    few = [draw(name, problem(n=3), generator(seed)) for seed in (1, 1, 2)]
    assert torch.equal(few[0], few[1])
    assert torch.equal(few[0], few[2]) == (name == "release")


@pytest.mark.parametrize("name", [name for name in STARTS if not STARTS[name].needs_features])
def test_a_random_start_looks_at_no_features(name):
    without = Problem(D, RANK, None, None, 1e-2)
    assert torch.equal(draw(name, without, generator()), draw(name, problem(), generator()))


@pytest.mark.parametrize("name", [name for name in STARTS if STARTS[name].needs_features])
def test_the_others_look_at_them(name):
    turned = Problem(D, RANK, Moment.of(inputs(1)), Moment.of(inputs(3).flip(1)), 1e-2)
    assert not torch.equal(draw(name, turned, generator()), draw(name, problem(), generator()))


@pytest.mark.parametrize("norm", [1.0, 0.57735, 8.0])
@pytest.mark.parametrize("name", STARTS)
def test_norm_match_rescales_every_row_and_turns_none(name, norm):
    plain, matched = (draw(name, problem(), generator(), each) for each in (None, norm))
    torch.testing.assert_close(matched.norm(dim=1), torch.full((RANK,), norm))
    cosines = torch.nn.functional.cosine_similarity(plain, matched)
    torch.testing.assert_close(cosines, torch.ones(RANK))
    assert matched.dtype == torch.float32


@pytest.mark.parametrize("rank", [0, -1, D + 1])
@pytest.mark.parametrize("name", STARTS)
def test_a_rank_that_the_layer_has_not_is_refused(name, rank):
    with pytest.raises(ValueError, match=rf"rank {rank} is not in 1\.\.{D}"):
        draw(name, problem(rank), generator())


# -- what each start is ------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, RANK, D])
@pytest.mark.parametrize("name", ORTHONORMAL)
def test_rows_are_orthonormal(name, rank):
    A = draw(name, problem(rank), generator())
    torch.testing.assert_close(A @ A.T, torch.eye(rank), rtol=0, atol=1e-6)


def test_each_start_is_its_function_of_own_and_others():
    case = problem()
    assert case.own is not None and case.others is not None
    expected = {
        "orthogonal": random_frame(D, RANK, generator(5)),
        "analytical": minor_subspace(case.others, RANK, generator(5)),
    }
    expected["contrastive"] = contrastive_subspace(
        case.own, case.others, RANK, generator(5), epsilon=1e-2
    )
    for name, A in expected.items():
        assert torch.equal(draw(name, case, generator(5)), A.float())


def test_the_release_meets_all_tasks_in_one_corner_of_the_null_space():
    """Both starts attain the minimum, 0; `analytical` gives each task a frame of its own."""
    d, rank = 256, 8
    means = torch.randn(8, d, generator=generator(1)) + 1
    collapsed = {}
    for name in ("release", "analytical"):
        frames = []
        for task in range(2):
            others = torch.cat([means[:task], means[task + 1 :]])
            case = Problem(d, rank, Moment.of(means[task : task + 1]), Moment.of(others), 1e-2)
            A = draw(name, case, generator(task))
            torch.testing.assert_close(A @ A.T, torch.eye(rank), rtol=0, atol=1e-5)
            assert (A @ others.T).abs().max() < 1e-3
            frames.append(A)
        collapsed[name] = torch.linalg.svdvals(frames[0] @ frames[1].T).median()
    assert collapsed["release"] > 0.95 and collapsed["analytical"] < 0.3


def test_epsilon_moves_the_contrastive_start_from_little_other_to_much_own_energy():
    case = problem()
    frames = [
        draw("contrastive", problem(epsilon=epsilon), generator()) for epsilon in (1e-4, 1e-1, 1e2)
    ]
    own, others = ([each.energy(A) for A in frames] for each in (case.own, case.others))
    assert own == sorted(own) and others == sorted(others)
    assert own[0] < own[-1] and others[0] < others[-1]


PEFTS = {"gaussian": "gaussian", "kaiming": True}
"""{start: PEFT's init_lora_weights}"""


def of_peft(init: str | bool, width: int, rank: int, seed: int) -> np.ndarray:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(width, 3)

    torch.manual_seed(seed)
    config = LoraConfig(r=rank, target_modules=["layer"], init_lora_weights=init)
    layer = get_peft_model(Model(), config).get_base_model().layer
    return layer.lora_A["default"].weight.detach().double().numpy()


@pytest.mark.parametrize("width, rank", [(64, 2), (128, 8), (48, 16)])
@pytest.mark.parametrize("name", PEFTS)
def test_entries_have_the_distribution_of_pefts_own(name, width, rank):
    empty = Problem(width, rank, None, None, 1e-2)
    ours = np.stack([draw(name, empty, generator(seed)).double().numpy() for seed in range(60)])
    theirs = np.stack([of_peft(PEFTS[name], width, rank, seed) for seed in range(60)])
    assert ours.std() == pytest.approx(theirs.std(), rel=0.03)
    assert abs(ours.mean()) < 0.03 * ours.std()
    norms, expected = (np.linalg.norm(each, axis=2) for each in (ours, theirs))
    assert norms.mean() == pytest.approx(expected.mean(), rel=0.02)
    assert scipy.stats.ks_2samp(ours.ravel(), theirs.ravel()).pvalue > 1e-3
    assert scipy.stats.ks_2samp(norms.ravel(), expected.ravel()).pvalue > 1e-3


@pytest.mark.parametrize("name, norm", [("gaussian", D**0.5 / RANK), ("kaiming", 3**-0.5)])
def test_row_norms_of_pefts_starts_are_as_documented(name, norm):
    norms = torch.stack([draw(name, problem(), generator(s)).norm(dim=1) for s in range(300)])
    assert float(norms.square().mean() ** 0.5) == pytest.approx(norm, rel=0.02)


# -- the table ---------------------------------------------------------------------------------


def test_the_flag_offers_the_table():
    (flag,) = (each for each in dataclasses.fields(TrainConfig) if each.name == "init")
    assert flag.metadata["options"]["choices"] == tuple(STARTS)
    assert flag.default in STARTS
    for name, row in STARTS.items():
        assert row.name == name and row.summary
        assert name in flag.metadata["options"]["help"]


def test_a_new_start_is_a_row(monkeypatch):
    def last_coordinates(problem: Problem, generator: Generator) -> torch.Tensor:
        return torch.eye(problem.d)[-problem.rank :] * problem.others.count

    row = Start("last", last_coordinates, True, "the last coordinates")
    monkeypatch.setitem(STARTS, "last", row)
    A = draw("last", problem(), generator(), norm=2.0)
    assert torch.equal(A, 2 * torch.eye(D)[-RANK:])
    config = TrainConfig(init="last")
    assert needs_features(config) and "-last-" in run_name(config)
    moments = {task: {"w": Moment.of(inputs(i, n=i))} for i, task in enumerate("abc", start=1)}
    found = starts(
        *(StartConfig("last"), {"w": (RANK, D)}, "ab"),
        **{"features": moments, "leaders": {"w": "w"}, "others": "abc"},
    )
    assert torch.equal(found["a"]["w"], 5 * torch.eye(D)[-RANK:])
    assert torch.equal(found["b"]["w"], 4 * torch.eye(D)[-RANK:])
