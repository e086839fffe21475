"""merge.py --search: λ from data that is neither trained on nor reported."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from osrm import load_merged, session
from osrm.adapters import add_lora, save_adapter, write_factors
from osrm.backbones import find_backbone, load_tokenizer, projections
from osrm.commands import merger
from osrm.config import MergeConfig
from osrm.data import fingerprint, load_task, split_task, tokenize
from osrm.errors import UserError
from osrm.evaluation import predict_splits, scores
from osrm.flags import parse
from osrm.glue import TASKS
from osrm.merged import MergedUpdate
from osrm.records import Search
from tests.conftest import merge_them, write_data

NAMES = ["rte", "sst2", "stsb"]
GRID = [0.3, 0.05, 1.0, 0.7]
SCALED = ["task_arithmetic", "ties", "emr", "iso_c"]
"""Methods whose result is factors, dense, or masked."""
SEED, HELD_OUT = 7, 25


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), NAMES, train=300, validation=40)


@pytest.fixture(scope="module")
def made(tiny, data_dir, tmp_path_factory) -> dict[str, Path]:
    """Run directories as train_glue.py leaves them, with random adapters and heads."""
    folder = tmp_path_factory.mktemp("made")
    for i, task in enumerate(NAMES):
        torch.manual_seed(i)
        base = AutoModelForSequenceClassification.from_pretrained(
            tiny["roberta"], num_labels=TASKS[task].num_labels
        )
        modules = projections(base, "qv", 2)
        model = add_lora(base, modules, 2, 4)
        sizes = dict.fromkeys(modules, (2, 32))
        write_factors(
            model,
            {name: torch.randn(size) for name, size in sizes.items()},
            {name: torch.randn(size).T for name, size in sizes.items()},
        )
        save_adapter(model, folder / task)
        settings = {
            "task": task,
            "backbone": str(tiny["roberta"]),
            "init": "gaussian",
            "load_model_path": None,
            "seed": SEED,
            "data_dir": str(data_dir),
            "max_train_samples": 100,
            "max_eval_samples": HELD_OUT,
            "select_on": "held-out",
            "max_seq_len": 32,
            "data": {"selection": {"fingerprint": fingerprint(held_out(task, data_dir))}},
        }
        (folder / task / "args.json").write_text(json.dumps(settings))
    return {task: folder / task for task in NAMES}


@pytest.fixture
def runs(made, tmp_path) -> dict[str, Path]:
    """A copy to damage."""
    return {task: shutil.copytree(path, tmp_path / task) for task, path in made.items()}


def held_out(task: str, data_dir: Path):
    return split_task(load_task(TASKS[task], str(data_dir)), SEED, 100, HELD_OUT).selection


def merged(paths, out: Path, **options) -> dict:
    """Run merge.py; what results.json says."""
    path = merge_them(paths, out.parent, out.name, **options) / "results.json"
    return json.loads(path.read_text()) if path.exists() else {}


def edit_args(run: Path, **changes) -> None:
    path = run / "args.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# -- the choice --------------------------------------------------------------------------------


def test_the_choice_is_that_of_merging_with_every_scale_and_scoring_by_hand(
    made, data_dir, tiny, tmp_path
):
    results = merged(made, tmp_path / "found", search=GRID, methods=["average", *SCALED])
    assert [*results["search"]] == SCALED
    grids = {method: found["grid"] for method, found in results["search"].items()}
    assert len({*map(tuple, grids.values())}) > 1, "nothing went on beyond the grid"
    tokenizer = load_tokenizer(find_backbone(str(tiny["roberta"])))
    data = {
        task: {"": tokenize(held_out(task, data_dir), TASKS[task], tokenizer, 32)} for task in NAMES
    }
    by_hand: dict[str, dict[str, list[float]]] = {
        method: {task: [] for task in NAMES} for method in SCALED
    }
    for scale in sorted({scale for grid in grids.values() for scale in grid}):
        out, methods = tmp_path / f"{scale}", [name for name in SCALED if scale in grids[name]]
        merged(made, out, methods=methods, scale=scale, no_eval=True)
        for method in methods:
            for task in NAMES:
                model = load_merged(out / method, task)
                found = predict_splits(model, TASKS[task], data[task], tokenizer, batch_size=64)
                metrics = scores(TASKS[task], found)
                assert metrics["eval_samples"] == HELD_OUT
                by_hand[method][task].append(metrics[f"eval_{TASKS[task].score}"])
    for method, found in results["search"].items():
        average = [sum(each) / 3 for each in zip(*by_hand[method].values())]
        assert len({round(each, 6) for each in average}) > 1, "nothing to choose"
        assert {*GRID} <= {*found["grid"]} and found["grid"] == sorted(found["grid"])
        assert found["scores"] == by_hand[method]
        assert found["average"] == pytest.approx(average)
        assert found["best"] == found["grid"][average.index(max(average))]


def test_what_is_saved_and_reported_has_the_chosen_scale(made, tmp_path):
    methods = ["average", "ties", "emr"]
    results = merged(made, tmp_path / "out", search=[0.3, 0.05, 0.7], methods=methods)
    rows = {row["name"]: row for row in results["rows"]}
    assert {each["held_out_examples"] for each in results["evaluation"].values()} == {HELD_OUT}
    for method in methods:
        recipe = json.loads((tmp_path / "out" / method / "recipe.json").read_text())
        assert recipe["knobs"] == rows[method]["knobs"]
        assert recipe.get("search") == results["search"].get(method)
    for scale in {found["best"] for found in results["search"].values()}:
        methods = [name for name, found in results["search"].items() if found["best"] == scale]
        again = tmp_path / f"{scale}"
        expected = merged(made, again, methods=methods, scale=scale)
        assert expected["search"] == {} and not (again / "search.png").exists()
        scores = {row["name"]: row["scores"] for row in expected["rows"]}
        for method in methods:
            assert results["search"][method]["chosen_on"] == "held-out data"
            assert rows[method]["knobs"]["scale"] == scale
            assert scores[method] == rows[method]["scores"]
            for task in NAMES:
                one = MergedUpdate(tmp_path / "out" / method, task)
                two = MergedUpdate(again / method, task)
                assert all(torch.equal(one[module], two[module]) for module in two)
    assert (tmp_path / "out" / "search.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.rglob(".*"))
    merged(made, tmp_path / "out", search=[0.5], overwrite=True)  # that plot is ours


def test_the_reported_examples_are_scored_once_a_row_and_choose_nothing(
    made, data_dir, tmp_path, monkeypatch
):
    scored = []

    def counting(model, task, splits, *rest, **options):
        scored.append(len(splits[""]))
        return predict_splits(model, task, splits, *rest, **options)

    monkeypatch.setattr(session, "predict_splits", counting)
    before = merged(made, tmp_path / "before", search=GRID, methods=SCALED)
    assert scored.count(40) == len(NAMES) * len(before["rows"])
    tried = sum(len(found["grid"]) for found in before["search"].values())
    assert scored.count(HELD_OUT) == len(NAMES) * tried
    other = shutil.copytree(data_dir, tmp_path / "data")
    for task in NAMES:
        path = other / task / "validation.jsonl"
        examples = [json.loads(line) for line in path.read_text().splitlines()]
        labels = [each["label"] for each in examples]
        random.Random(0).shuffle(labels)
        lines = [json.dumps(each | {"label": label}) for each, label in zip(examples, labels)]
        path.write_text("\n".join(lines))
    after = merged(made, tmp_path / "after", search=GRID, methods=SCALED, data_dir=str(other))
    assert after["rows"][0]["scores"] != before["rows"][0]["scores"]
    assert after["search"] == before["search"]


def test_one_model_a_task_is_loaded_for_all_methods(made, tmp_path, monkeypatch):
    loaded = []
    original = session.load_model

    def counting(*args):
        loaded.append(args)
        return original(*args)

    monkeypatch.setattr(session, "load_model", counting)
    methods = ["task_arithmetic", "ties", "dare_linear"]
    found = merged(made, tmp_path / "out", search=GRID, methods=methods)["search"].values()
    longest = max(len(search["grid"]) for search in found)
    # To search the grid, beyond its edges, and to report.
    assert len(loaded) == (1 + longest - len(GRID) + 1) * len(NAMES)


def chosen(**scores: list[float]) -> Search:
    """The search over λ = 1, 2, 3, ... with these scores."""
    curves = {
        task: {float(i): value for i, value in enumerate(values, 1)}
        for task, values in scores.items()
    }
    return Search.choose(curves, {})


def test_a_tie_goes_to_the_smaller_scale():
    # 0.1 + 0.7 and 0.3 + 0.5 differ in the last bit.
    assert chosen(rte=[0.0, 0.1, 0.3, 0.1], sst2=[0.0, 0.7, 0.5, 0.2]).best == 2
    assert chosen(rte=[0.5] * 4).best == 1
    assert chosen(rte=[-0.5, -0.2, -0.1, -0.3]).best == 3


def test_a_search_goes_on_beyond_an_edge_that_is_the_best():
    assert chosen(rte=[0.1, 0.3, 0.2]).beyond() is None
    assert chosen(rte=[0.1, 0.2, 0.3]).beyond() == 4.5
    assert chosen(rte=[0.3, 0.2, 0.1]).beyond() == 0.667
    assert chosen(rte=[0.1, 0.3, 0.3]).beyond() is None  # 2 is the best
    assert chosen(rte=[0.3, 0.3, 0.3]).beyond() is None  # λ makes no difference
    assert chosen(rte=[0.3]).beyond() is None  # no grid


@pytest.mark.parametrize("best, grid", [(0.2, 6), (0.6, 3), (2.0, 6), (1e9, 9), (0.0, 9)])
def test_the_grid_grows_until_its_best_is_inside(made, tmp_path, monkeypatch, caplog, best, grid):
    def held_out_scores(*_, wanted, **__):
        return {
            method: {scale: -abs(scale - best) for scale in scales}
            for method, scales in wanted.items()
        }

    monkeypatch.setattr(merger, "held_out_scores", held_out_scores)
    found = merged(made, tmp_path / "out", search=[0.4, 0.5, 1.0], methods=["task_arithmetic"])
    search = found["search"]["task_arithmetic"]
    assert search["best"] == min(search["grid"], key=lambda scale: abs(scale - best))
    assert search["best"] == found["rows"][-1]["knobs"]["scale"]
    inside = search["best"] not in (search["grid"][0], search["grid"][-1])
    assert inside == (len(search["grid"]) < 3 + merger.MOST)
    assert len(search["grid"]) == grid
    assert ("may be beyond" in caplog.text) == (not inside)


def test_a_scale_given_twice_is_tried_once(made, tmp_path):
    found = merged(made, tmp_path / "out", search=[1, 0.5, 1.0], methods=["ties", "average"])
    assert [*found["search"]] == ["ties"]
    grid = found["search"]["ties"]["grid"]
    assert len({*grid}) == len(grid) and {0.5, 1.0} <= {*grid}


def test_the_density_is_chosen_too(made, tmp_path):
    methods = ["ties", "task_arithmetic"]
    found = merged(made, tmp_path / "out", search=GRID, search_density=[0.5, 0.05], methods=methods)
    averages = {}
    for density in (0.05, 0.5):
        out = tmp_path / f"{density}"
        each = merged(made, out, search=GRID, density=density, methods=["ties"])
        averages[density] = each["search"]["ties"]["average"]
    best = max(averages, key=lambda density: max(averages[density]))
    chosen = found["search"]["ties"]
    assert max(averages[0.05]) != max(averages[0.5]), "nothing to choose"
    assert chosen["knobs"] == {"density": best} and chosen["average"] == averages[best]
    assert found["search"]["task_arithmetic"]["knobs"] == {}
    rows = {row["name"]: row["knobs"] for row in found["rows"]}
    assert rows["ties"] == {"density": best, "scale": chosen["best"]}
    merged(
        made, tmp_path / "so", methods=["ties"], density=best, scale=chosen["best"], no_eval=True
    )
    for path in (tmp_path / "so" / "ties" / "updates").iterdir():
        assert path.read_bytes() == (tmp_path / "out/ties/updates" / path.name).read_bytes()


# -- refusals ----------------------------------------------------------------------------------


def select_on_validation(runs, data):
    edit_args(runs["sst2"], select_on="validation")


def without_args(runs, data):
    (runs["sst2"] / "args.json").unlink()


def of_another_version(runs, data):
    edit_args(runs["sst2"], data={})


def transformed(runs, data):
    edit_args(runs["sst2"], source={"held_out": "other examples"})


def another_seed(runs, data):
    edit_args(runs["sst2"], seed=SEED + 1)


def another_data_set(runs, data):
    path = data / "sst2" / "train.jsonl"
    path.write_text(path.read_text().replace("good", "bad"))


@pytest.mark.parametrize(
    "damage, why",
    [
        (select_on_validation, "--select-on validation"),
        (without_args, "no args.json of train_glue.py"),
        (of_another_version, "no args.json of train_glue.py"),
        (transformed, "transformed"),
        (another_seed, "no longer that of the run"),
        (another_data_set, "no longer that of the run"),
    ],
)
def test_runs_without_known_held_out_data(runs, data_dir, tmp_path, monkeypatch, damage, why):
    def no_work(*_):
        raise AssertionError("it merged or scored before it refused")

    monkeypatch.setattr(merger, "merge", no_work)
    monkeypatch.setattr(session, "predict_splits", no_work)
    data = shutil.copytree(data_dir, tmp_path / "data")
    damage(runs, data)
    with pytest.raises(UserError, match=why) as caught:
        merged(runs, tmp_path / "out", search=GRID, data_dir=str(data))
    message = str(caught.value)
    assert message.startswith(f"--search, task 'sst2': {runs['sst2']}: ")
    assert message.endswith("; give --scale instead") and "\n" not in message
    assert not (tmp_path / "out").exists()


def test_methods_without_a_scale(made, tmp_path):
    with pytest.raises(UserError, match="--search: none of average has the knob 'scale'"):
        merged(made, tmp_path / "out", search=GRID, methods=["average"])


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--search 0.5 --scale 0.3", ["--search", "--scale", "one of them"]),
        ("--search 0.5 --no-eval", ["--search", "--no-eval", "one of them"]),
        ("--search 0.5 --scale 1 --no-eval", ["--scale", "--no-eval"]),
        ("--search 0.5 0 nan 1 inf -2", ["--search 0 nan inf -2:", "finite", "above 0"]),
        ("--search 0 --max-test-samples 0", ["--search 0:", "--max-test-samples 0"]),
        ("--search 0 --per-device-eval-bsz 0", ["--search 0:", "--per-device-eval-bsz 0"]),
        ("--search 1 --search-density 0 2 0.5", ["--search-density 0 2:", "(0, 1]"]),
        ("--search-density 0.5", ["--search-density needs --search"]),
        ("--search 1 --search-density 0.5 --density 0.2", ["--density", "one of them"]),
        ("--rank 8", ["--rank 8", "--export adapter"]),
        ("--rank 0 --export adapter", ["--rank 0", "at least 1"]),
        (
            "--from r.json --methods ties --search 1 --scale 1 --density 1 --trim tensor",
            ["--from", "leave --methods, --search, --scale, --density, --trim out"],
        ),
    ],
)
def test_flags(flags, words):
    with pytest.raises(UserError) as caught:
        parse(MergeConfig, None, flags.split())
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), caught.value


def test_the_grid_is_a_list_of_numbers(capsys):
    assert parse(MergeConfig, None, ["--search", "0.1", "1", "2e-1"]).search == [0.1, 1.0, 0.2]
    assert parse(MergeConfig, None, []).search == []
    for wrong in (["--search"], ["--search", "much"]):
        with pytest.raises(SystemExit):
            parse(MergeConfig, None, wrong)
        assert "--search" in capsys.readouterr().err
