"""The feature bank: statistics in files that stand in for the data, their tasks' own or foreign."""

import json
import shutil
from unittest.mock import Mock

import pytest
import torch

from osrm.adapters import read_adapter
from osrm.bank import FeatureFile, read_bank
from osrm.commands.train import train
from osrm.errors import UserError
from osrm.moments import Moment
from osrm.runs import run_dir
from osrm.starts import StartConfig, starts
from tests.conftest import small, write_data

TASKS = ["rte", "sst2", "stsb"]
"""Those of tiny_data."""


def config_of(tiny, data, out, **more):
    return small(tiny, data, out, **{"tasks": ["rte"], "init": "analytical", "epochs": 1, **more})


def start_of(config, task="rte"):
    """{module: A before training} as the run has left it in init_model/."""
    pairs = read_adapter(run_dir(config, task) / "init_model").updates
    return {name: pair.A for name, pair in pairs.items()}


def args_of(config, task="rte"):
    return json.loads((run_dir(config, task) / "args.json").read_text())


def same(first, second):
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def no_pass(*_, **__):
    raise AssertionError("the features were computed again")


class Started(Exception):
    pass


def begin(config):
    """Run the command up to the first step of training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("osrm.commands.train.fit", Mock(side_effect=Started))
        with pytest.raises(Started):
            train(config)
    return start_of(config)


@pytest.fixture(scope="module")
def fresh(tiny, tiny_data, tmp_path_factory):
    """A run without a bank."""
    config = config_of(tiny, tiny_data, tmp_path_factory.mktemp("fresh"))
    begin(config)
    return config


@pytest.fixture(scope="module")
def filled(tiny, tiny_data, tmp_path_factory):
    """The bank of tiny_data's tasks, by --only-features."""
    folder = tmp_path_factory.mktemp("filled")
    options = {"feature_bank": str(folder / "bank"), "only_features": True}
    train(config_of(tiny, tiny_data, folder / "out", **options))
    return folder / "bank"


@pytest.fixture
def bank(filled, tmp_path):
    """A copy of it."""
    return shutil.copytree(filled, tmp_path / "bank")


@pytest.fixture(scope="module")
def ninth(tiny, tmp_path_factory):
    """The file of a task that GLUE has not, from somebody else's data."""
    folder = tmp_path_factory.mktemp("ninth")
    data = write_data(folder / "data", ["cola"], train=40, validation=10)
    options = {"feature_bank": str(folder / "bank"), "only_features": True, "tasks": ["cola"]}
    train(config_of(tiny, data, folder / "out", **options))
    return (folder / "bank/cola.safetensors").rename(folder / "ninth.safetensors")


def test_a_run_with_an_empty_bank_fills_it_and_starts_as_one_without(
    tiny, tiny_data, tmp_path, fresh, filled, own_feature_cache
):
    config = config_of(tiny, tiny_data, tmp_path / "out", feature_bank=str(tmp_path / "bank"))
    train(config)
    assert sorted(path.name for path in (tmp_path / "bank").iterdir()) == [
        f"{task}.safetensors" for task in TASKS
    ]
    assert not [*own_feature_cache.iterdir()], "they go to the bank, not into the cache"
    assert same(start_of(config), start_of(fresh))
    files = {task: FeatureFile(tmp_path / "bank" / f"{task}.safetensors") for task in TASKS}
    for task, file in files.items():
        assert file.settings["task"] == task and file.settings["backbone"] == str(tiny["roberta"])
        # --only-features writes the same bytes.
        assert file.path.read_bytes() == (filled / file.path.name).read_bytes()
    args = args_of(config)
    assert args["other_tasks"] == ["sst2", "stsb"]
    assert args["feature_files"] == {task: file.sha256 for task, file in files.items()}
    assert args["feature_files"] == args_of(fresh)["feature_files"]


@pytest.mark.parametrize("init", ["analytical", "contrastive"])
def test_a_full_bank_stands_in_for_the_data(tiny, tiny_data, tmp_path, bank, monkeypatch, init):
    """No other task's data needs to be here, and nobody looks at features again."""
    expected = begin(config_of(tiny, tiny_data, tmp_path / "whole", init=init))
    monkeypatch.setattr("osrm.bank.collect", no_pass)
    shutil.copytree(tiny_data / "rte", tmp_path / "data/rte")
    before = {path: path.read_bytes() for path in bank.iterdir()}
    options = {"init": init, "feature_bank": str(bank)}
    config = config_of(tiny, tmp_path / "data", tmp_path / "out", **options)
    train(config)
    assert same(start_of(config), expected)
    assert args_of(config)["other_tasks"] == ["sst2", "stsb"]
    assert {path: path.read_bytes() for path in bank.iterdir()} == before
    assert (run_dir(config, "rte") / "metrics.json").exists()


def test_what_a_bank_lacks_is_added_and_what_it_has_stays(tiny, tiny_data, tmp_path, fresh, bank):
    (bank / "stsb.safetensors").unlink()
    before = {path: path.stat().st_mtime_ns for path in bank.iterdir()}
    config = config_of(tiny, tiny_data, tmp_path / "out", feature_bank=str(bank))
    assert same(begin(config), start_of(fresh))
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert [*read_bank(bank)] == TASKS


def test_a_foreign_file_is_avoided_too(tiny, tiny_data, tmp_path, fresh, bank, ninth):
    shutil.copy(ninth, bank)
    config = config_of(tiny, tiny_data, tmp_path / "out", feature_bank=str(bank))
    A, without = begin(config), start_of(fresh)
    foreign = FeatureFile(bank / "ninth.safetensors")
    for name in A:
        assert not torch.equal(A[name], without[name])
        assert foreign[name].energy(A[name]) < foreign[name].energy(without[name])
    args = args_of(config)
    assert args["other_tasks"] == ["sst2", "stsb", "ninth"]
    assert args["feature_files"]["ninth"] == foreign.sha256


def test_a_foreign_file_can_be_named(tiny, tiny_data, tmp_path, bank, ninth):
    shutil.copy(ninth, bank)
    options = {"feature_bank": str(bank), "other_tasks": ["ninth"]}
    config = config_of(tiny, tiny_data, tmp_path / "out", **options)
    A, files = begin(config), read_bank(bank)
    start, layers = StartConfig("analytical", seed=config.seed), dict.fromkeys(A, (config.rank, 32))
    others = {"features": files, "leaders": files["rte"].leaders, "others": ["ninth"]}
    expected = starts(start, layers, ["rte"], **others)
    assert same(A, expected["rte"])
    assert args_of(config)["other_tasks"] == ["ninth"]
    with pytest.raises(UserError, match="--other-tasks: unknown task tenth"):
        train(config_of(tiny, tiny_data, tmp_path / "no", **options | {"other_tasks": ["tenth"]}))


def test_a_bank_of_more_layers_serves_fewer(tiny, tiny_data, tmp_path):
    """One made for q, k and v gives a run on v what its own features would give it."""
    found = []
    for blocks in (["qkv", "v"], ["v"]):
        folder = tmp_path / "-".join(blocks)
        for block in blocks:
            options = {"block": block, "feature_bank": str(folder / "bank")}
            A = begin(config_of(tiny, tiny_data, folder / "out", **options))
        found.append(A)
    assert same(*found)


# -- --only-features ---------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["gaussian", "contrastive"])
def test_only_features_trains_nothing(tiny, tiny_data, tmp_path, monkeypatch, filled, init):
    """With any --init, beside runs that are there already, and for one task alone too."""
    monkeypatch.setattr("osrm.commands.train.fit", no_pass)
    options = {"init": init, "feature_bank": str(tmp_path / "bank"), "only_features": True}
    config = config_of(tiny, tiny_data, tmp_path / "out", **options)
    run_dir(config, "rte").mkdir(parents=True)
    (run_dir(config, "rte") / "args.json").write_text("{}")
    before = sorted((tmp_path / "out").rglob("*"))
    train(config_of(tiny, tiny_data, tmp_path / "out", **options, other_tasks=["rte"]))
    assert [*read_bank(tmp_path / "bank")] == ["rte"], "this task alone"
    train(config)
    assert sorted((tmp_path / "out").rglob("*")) == before
    for path in filled.iterdir():
        assert (tmp_path / "bank" / path.name).read_bytes() == path.read_bytes()


# -- a bank that does not fit ------------------------------------------------------------------

MISFITS = {
    "another backbone": ({"family": "bert"}, ["body_fingerprint is '", "lacks 4 layers"]),
    "features": ({"features": "sample"}, ["features is 'token' there, 'sample' here"]),
    "padding": ({"count_padding": True}, ["count_padding is False there, True here"]),
    "block": ({"block": "qkv"}, ["lacks 2 layers (", ".key, ...)"]),
    "all": (
        {"family": "mpnet", "features": "mean", "count_padding": True, "block": "q"},
        ["body_fingerprint", "features", "count_padding", "lacks 2 layers"],
    ),
}


@pytest.mark.parametrize("only_features", [False, True])
@pytest.mark.parametrize("case", MISFITS)
def test_statistics_that_cannot_be_added_are_refused(
    tiny, tiny_data, tmp_path, bank, monkeypatch, case, only_features
):
    more, words = MISFITS[case]
    monkeypatch.setattr("osrm.bank.collect", no_pass)
    (bank / "sst2.safetensors").unlink()  # it must not be computed before the others are looked at
    options = {"feature_bank": str(bank), "only_features": only_features, **more}
    with pytest.raises(UserError) as caught:
        train(config_of(tiny, tiny_data, tmp_path / "out", **options))
    message = str(caught.value)
    assert "\n" not in message and message.startswith(str(bank))
    assert "rte.safetensors: " in message or "stsb.safetensors: " in message
    for word in words:
        assert word in message, message
    assert not (tmp_path / "out").exists() and len([*bank.iterdir()]) == 2


def test_another_body_of_the_same_family_is_refused(tiny, tiny_data, tmp_path, bank):
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(tiny["roberta"])
    model.embeddings.word_embeddings.weight.data[:] *= 2
    for each in (model, AutoTokenizer.from_pretrained(tiny["roberta"])):
        each.save_pretrained(tmp_path / "other")
    config = config_of({"roberta": tmp_path / "other"}, tiny_data, tmp_path, feature_bank=str(bank))
    with pytest.raises(UserError, match=r"safetensors: body_fingerprint is '\w+' there, '\w+' her"):
        train(config)


def test_an_interrupted_run_goes_on_with_the_same_statistics_alone(
    tiny, tiny_data, tmp_path, bank, ninth
):
    begin(config_of(tiny, tiny_data, tmp_path / "out", feature_bank=str(bank)))
    resumed = config_of(tiny, tiny_data, tmp_path / "out", feature_bank=str(bank), resume=True)
    begin(resumed)
    shutil.copy(ninth, bank / "sst2.safetensors")
    with pytest.raises(UserError, match="feature_files was"):
        train(resumed)


# -- the other new flags -----------------------------------------------------------------------


def test_the_contrastive_start_trains(tiny, tiny_data, tmp_path, filled):
    """On own features it has more energy than OSRM's, against that of the others."""
    found = {}
    for init in ("contrastive", "analytical"):
        options = {"init": init, "feature_bank": str(filled), "epochs": 2}
        config = config_of(tiny, tiny_data, tmp_path, **options)
        train(config)
        assert (run_dir(config, "rte") / "metrics.json").exists()
        after = read_adapter(run_dir(config, "rte")).updates
        assert all(pair.B.any() for pair in after.values())
        found[init] = start_of(config)
    bank = read_bank(filled)
    for name, A in found["contrastive"].items():
        torch.testing.assert_close(A @ A.T, torch.eye(2))
        own, others = bank["rte"][name], bank["sst2"][name] + bank["stsb"][name]
        assert isinstance(own, Moment)
        assert own.energy(A) > own.energy(found["analytical"][name])
        assert others.energy(A) > others.energy(found["analytical"][name])


def test_epsilon_says_what_little_energy_is(tiny, tiny_data, tmp_path, filled):
    bank, energies = read_bank(filled), []
    for epsilon in (1e-6, 1e2):
        options = {"init": "contrastive", "epsilon": epsilon, "feature_bank": str(filled)}
        A = begin(config_of(tiny, tiny_data, tmp_path, **options))
        energies.append(sum(bank["sst2"][name].energy(A[name]) for name in A))
    assert energies[0] < energies[1]


@pytest.mark.parametrize("init", ["gaussian", "kaiming", "orthogonal", "analytical", "contrastive"])
def test_norm_match_gives_every_row_that_norm(tiny, tiny_data, tmp_path, filled, init):
    config = config_of(
        *(tiny, tiny_data, tmp_path), init=init, norm_match=0.25, feature_bank=str(filled)
    )
    for A in begin(config).values():
        torch.testing.assert_close(A.norm(dim=1), torch.full((2,), 0.25))
    assert args_of(config)["norm_match"] == 0.25 and "-norm0.25" in run_dir(config, "rte").name
