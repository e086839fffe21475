"""Checkpoints moved out of the way: optimal filters, ordinary adapters, scores before and after."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from osrm.adapters import read_adapter
from osrm.bank import FeatureFile
from osrm.checkpoints import checksum
from osrm.commands.train import train
from osrm.config import TrainConfig
from osrm.glue import TASKS
from osrm.moments import Moment, own_and_others
from osrm.runs import run_dir
from osrm.task_vectors import LoraPair
from osrm.transforms import factorised, nullify, uniform
from tests.conftest import updates_and_head

D, RANK = 12, 3
NAMES = ["rte", "sst2", "stsb"]


def gaussian(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows(seed, n=60):
    """Correlated vectors, another spectrum and other axes for each seed."""
    return gaussian(n, D, seed=seed) @ (gaussian(D, D, seed=seed + 50) * torch.logspace(0, -2, D))


A = gaussian(RANK, D, seed=1)
B = gaussian(5, RANK, seed=2)
OWN, OTHERS = rows(3), rows(4, n=40)
MOMENTS = Moment.of(OWN), Moment.of(OTHERS)


def loss(filtered, kappa, B=B):
    """The definition, on the vectors themselves."""
    change = (OWN @ (filtered.double() - A).T @ B.T).square().sum(1).mean()
    return float(change + kappa * (OTHERS @ filtered.double().T @ B.T).square().sum(1).mean())


def filtered(A, own, others, kappa, epsilon=1e-12):
    return nullify(A, own, others, kappa=kappa, epsilon=epsilon)


@pytest.mark.parametrize("kappa", [0.1, 1.0, 30.0])
def test_nullify_is_least_squares(kappa):
    """An independent oracle: one stacked regression, √κ times the others' vectors to zero."""
    X = np.concatenate([OWN / len(OWN) ** 0.5, (kappa / len(OTHERS)) ** 0.5 * OTHERS])
    Y = np.concatenate([OWN @ A.T / len(OWN) ** 0.5, np.zeros((len(OTHERS), RANK))])
    expected = np.linalg.lstsq(X, Y, rcond=None)[0].T
    np.testing.assert_allclose(filtered(A, *MOMENTS, kappa), expected, rtol=1e-5, atol=1e-6)


def test_directions_that_no_feature_has_stay_as_they_were():
    """Ten vectors in twelve dimensions; a hair of own energy alone must not be fitted."""
    axes = torch.linalg.qr(gaussian(D, D, seed=7))[0]
    seen, unseen = axes[:10], axes[10:]
    own, others = (Moment.of(gaussian(60, 10, seed=seed) @ seen) for seed in (8, 9))
    found = filtered(A, own, others, 1.0, 1e-2).double()
    torch.testing.assert_close(found @ unseen.T, A @ unseen.T, rtol=1e-4, atol=1e-5)
    hair = Moment.of(gaussian(60, 10, seed=8) @ seen + 1e-6 * gaussian(60, 2, seed=6) @ unseen)
    found = filtered(A, hair, others, 1.0, 1e-2).double()
    torch.testing.assert_close(found @ unseen.T, A @ unseen.T, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("kappa", [0.1, 1.0, 30.0])
def test_no_other_filter_does_better_for_any_B(kappa):
    """Among them, taking the others' dominant directions out of A, as many as you like."""
    best = filtered(A, *MOMENTS, kappa)
    _, _, axes = torch.linalg.svd(OTHERS, full_matrices=False)
    projected = [A - A @ axes[:k].T @ axes[:k] for k in range(D + 1)]
    nearby = [best.double() + 1e-2 * gaussian(RANK, D, seed=seed) for seed in range(20)]
    for seed in range(3):
        B = gaussian(7, RANK, seed=60 + seed)
        others = [loss(each, kappa, B) for each in (*projected, *nearby)]
        assert loss(best, kappa, B) < min(others)


def test_nullify_at_its_ends():
    torch.testing.assert_close(filtered(A, *MOMENTS, 0.0).double(), A, rtol=1e-5, atol=1e-6)
    everywhere = filtered(A, *MOMENTS, 1e9).double()
    assert everywhere.norm() < 1e-4 * A.norm()
    few = Moment.of(OTHERS[:4])  # the others leave eight directions free
    spared = filtered(A, MOMENTS[0], few, 1e9).double()
    assert (OTHERS[:4] @ spared.T).norm() < 1e-4 * (OTHERS[:4] @ A.T).norm()
    assert spared.norm() > 0.1 * A.norm()


def test_the_sum_of_nullified_updates_is_the_regmean_merge():
    """Weights κ that make S_own + κ S_others the sum of all tasks' moments (equal counts)."""
    moments = {task: Moment.of(rows(seed)) for seed, task in enumerate(NAMES, 10)}
    pairs = {
        t: (gaussian(RANK, D, seed=i), gaussian(5, RANK, seed=i + 9)) for i, t in enumerate(NAMES)
    }
    found = sum(
        pairs[task][1] @ filtered(pairs[task][0], own, others, len(NAMES) - 1).double()
        for task, own, others in own_and_others(moments, NAMES, NAMES)
    )
    grams = [moments[task].gram for task in NAMES]
    expected = sum(B @ A @ G for (A, B), G in zip(pairs.values(), grams)) @ torch.linalg.inv(
        sum(grams)
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_statistics_without_energy():
    nothing = Moment.of(torch.zeros(3, D))
    torch.testing.assert_close(filtered(A, nothing, nothing, 1.0, 1e-2).double(), A)
    torch.testing.assert_close(
        filtered(A, MOMENTS[0], nothing, 1.0, 1e-2).double(), A, rtol=1e-5, atol=1e-6
    )


def test_dense_updates_become_the_nearest_factors():
    delta = gaussian(8, D, seed=5).float()
    pair = factorised(delta, 4, 2.0)
    assert pair.scaling == 2.0 and pair.A.shape == (4, D)
    torch.testing.assert_close(pair.A @ pair.A.T, torch.eye(4), rtol=0, atol=1e-5)
    left = np.linalg.svd(delta.numpy(), compute_uv=False)[4:]
    assert float((delta - pair.delta).norm()) == pytest.approx(np.sqrt((left**2).sum()), rel=1e-5)
    low = LoraPair(A.float(), B.float(), 0.5)
    assert factorised(low, 1, 2.0) is low
    torch.testing.assert_close(factorised(low.delta, RANK, 2.0).delta, low.delta)


def test_padding_changes_no_update():
    pair = LoraPair(A.float(), B.float(), 0.5)
    padded = uniform(pair, RANK + 2, 3.0)
    assert len(padded.A) == RANK + 2 and padded.scaling == 3.0
    torch.testing.assert_close(padded.delta, pair.delta)


# -- the command -------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["roberta", "t5"])
def runs(request, tiny, tiny_data, tmp_path_factory):
    """Three tiny tasks of one family, trained from PEFT's start, with their dense models."""
    out = tmp_path_factory.mktemp(f"runs-{request.param}")
    config = TrainConfig(
        backbone=str(tiny[request.param]),
        data_dir=str(tiny_data),
        output_dir=str(out),
        rank=2,
        alpha=4,
        epochs=2,
        lr=1e-2,
        per_device_train_bsz=16,
        max_seq_len=32,
        save_merged_model=True,
    )
    train(config)
    return config


def moved(runs: TrainConfig, tmp_path: Path, below: str = "", **more) -> TrainConfig:
    paths = {task: str(run_dir(runs, task) / below) for task in NAMES}
    (tmp_path / "paths.json").write_text(json.dumps(paths))
    config = replace(
        runs,
        load_model_path=str(tmp_path / "paths.json"),
        output_dir=str(tmp_path / "moved"),
        save_merged_model=False,
        **more,
    )
    train(config)
    return config


def metrics_of(config: TrainConfig, task: str) -> dict[str, float]:
    return json.loads((run_dir(config, task) / "metrics.json").read_text())


def test_project_moves_the_update_into_the_subspace(runs, tmp_path):
    """Details 2, 17 and 18: B = ΔW Aᵀ / scaling, with the trained head."""
    config = moved(runs, tmp_path, transform="project", init="analytical")
    for task in NAMES:
        source, source_head = updates_and_head(run_dir(runs, task))
        found, head = updates_and_head(run_dir(config, task))
        for name, pair in found.items():
            A, delta = pair.A.double(), source[name].delta.double()
            torch.testing.assert_close(A @ A.T, torch.eye(2).double(), rtol=0, atol=1e-6)
            torch.testing.assert_close(pair.delta.double(), delta @ A.T @ A, rtol=1e-4, atol=1e-6)
        assert all(torch.equal(head[name], source_head[name]) for name in head)


@pytest.mark.parametrize("below", ["", "merged_model"])
def test_nullify_filters_A_by_the_tasks_own_statistics(runs, tmp_path, below, own_feature_cache):
    """An adapter keeps its B; a dense checkpoint of the same update gives the same result."""
    config = moved(runs, tmp_path, below, kappa=0.5)
    files = [FeatureFile(path) for path in (own_feature_cache / "features").glob("*")]
    features = {file.settings["task"]: file for file in files}
    for task in NAMES:
        source, source_head = updates_and_head(run_dir(runs, task))
        found, head = updates_and_head(run_dir(config, task))
        kept = left = own = others = 0.0
        for name, pair in found.items():
            grams = {each: features[each][name].gram.numpy() for each in NAMES}
            counts = {each: features[each][name].count for each in NAMES}
            S = grams[task] / counts[task]
            rest = [each for each in NAMES if each != task]
            S_others = sum(grams[each] for each in rest) / sum(counts[each] for each in rest)
            delta = source[name].delta.double().numpy()
            S_kept = S + 1e-2 * np.trace(S) / len(S) * np.eye(len(S))
            expected = delta @ S_kept @ np.linalg.inv(S_kept + 0.5 * S_others)
            np.testing.assert_allclose(
                pair.delta, expected, rtol=1e-3, atol=1e-3 * abs(delta).max()
            )
            if not below:
                torch.testing.assert_close(pair.B, source[name].B)
            own += np.trace(delta @ S @ delta.T)
            others += np.trace(delta @ S_others @ delta.T)
            kept += np.trace(expected @ S @ expected.T)
            left += np.trace(expected @ S_others @ expected.T)
        metrics = metrics_of(config, task)
        assert metrics["own_output_kept"] == pytest.approx(kept / own, rel=1e-2)
        assert metrics["others_output_left"] == pytest.approx(left / others, rel=1e-2)
        assert left / others < kept / own
        assert all(torch.equal(head[name], source_head[name]) for name in head)


def test_scores_before_and_after_alone_and_merged(runs, tmp_path):
    """With κ = 0 nothing moves: after is before, and before is what the run itself says."""
    config = moved(runs, tmp_path, kappa=0.0)
    for task in NAMES:
        metrics, source = metrics_of(config, task), metrics_of(runs, task)
        score = f"eval_{TASKS[task].score}"
        assert metrics[f"source_{score}"] == pytest.approx(source[score], abs=1e-4)
        assert metrics[score] == pytest.approx(metrics[f"source_{score}"], abs=1e-4)
        assert metrics[f"merged_{score}"] == pytest.approx(
            metrics[f"source_merged_{score}"], abs=1e-4
        )
        assert metrics["own_output_kept"] == pytest.approx(1, rel=1e-4)
    args = json.loads((run_dir(config, "rte") / "args.json").read_text())
    source_args = json.loads((run_dir(runs, "rte") / "args.json").read_text())
    assert args["source"]["sha256"] == checksum(run_dir(runs, "rte"))
    assert args["source"]["held_out"] == source_args["data"]["selection"]["fingerprint"]


def test_one_checkpoint_alone_has_no_merge(runs, tmp_path):
    config = moved(runs, tmp_path, tasks=["rte"])
    assert not [name for name in metrics_of(config, "rte") if "merged" in name]


def test_the_adapters_own_rank_is_kept(runs, tmp_path):
    config = moved(runs, tmp_path, rank=1, alpha=7)
    found = read_adapter(run_dir(config, "rte")).updates
    assert {len(pair.A) for pair in found.values()} == {2}
    assert {pair.scaling for pair in found.values()} == {2.0}


def test_a_checkpoint_that_is_in_the_subspace_already_comes_through_unchanged(runs, tmp_path):
    """With A held fixed in training, projecting onto that A loses nothing."""
    more = {"init": "analytical", "freeze": "A", "save_merged_model": False}
    frozen = replace(runs, output_dir=str(tmp_path / "frozen"), tasks=["rte"], **more)
    train(frozen)
    (tmp_path / "paths.json").write_text(json.dumps({"rte": str(run_dir(frozen, "rte"))}))
    again = replace(frozen, load_model_path=str(tmp_path / "paths.json"), transform="project")
    train(again)
    before = read_adapter(run_dir(frozen, "rte")).updates
    after = read_adapter(run_dir(again, "rte")).updates
    for name, pair in before.items():
        torch.testing.assert_close(after[name].delta, pair.delta, rtol=1e-4, atol=1e-7)
    metrics = metrics_of(again, "rte")
    assert metrics["own_output_kept"] == pytest.approx(1, abs=1e-5)
