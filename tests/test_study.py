"""The page of a study: its statistics, its verdicts, and what it does with half of the results."""

import json
import re
import shutil
import sys
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import pandas as pd
import pytest

from osrm.glue import TASKS, task_scores
from tests.conftest import ROOT, Forked

sys.path.insert(0, str(ROOT / "reproduce"))

import claims
import report
import tables
from bootstrap import example_resamples, interval, score, seed_interval
from plan import QUESTIONS
from study import Difference, Study, area, over_seeds

N, NAMES = 60, ["mrpc", "cola", "stsb"]
ROWS = ["pre-trained", "individual", "task_arithmetic", "ties", "emr"]


# -- statistics --------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("kind", ["random", "constant", "constant truth", "perfect"])
def test_scores_of_resamples_are_glues_on_each_of_them(task, kind):
    rng = np.random.default_rng(1)
    labels = len(TASKS[task].labels)
    draw = (lambda: rng.integers(0, labels, N)) if labels else (lambda: rng.normal(size=N).round(1))
    true, predicted = draw(), draw()
    if kind == "constant":
        predicted = np.full_like(predicted, 1)
    if kind == "constant truth":
        true = np.full_like(true, 1)
    if kind == "perfect":
        predicted = true.copy()
    drawn = np.stack([np.arange(N), *rng.integers(0, N, (4, N))])
    found = score(task, predicted[drawn].astype(float), true[drawn].astype(float))
    for value, each in zip(found, drawn, strict=True):
        expected = task_scores(TASKS[task], predicted[each], true[each])[TASKS[task].score]
        assert value == pytest.approx(expected, abs=1e-6)


def test_the_interval_is_that_of_a_loop_over_seeds_and_resamples():
    rng = np.random.default_rng(5)
    table = {seed: rng.normal(seed, 1, 500) for seed in (1, 2, 3)}
    again = np.random.default_rng(0)
    seeds, resamples = again.integers(0, 3, (500, 3)), again.integers(0, 500, (500, 3))
    means = [
        mean(table[s + 1][r] for s, r in zip(*pair)) for pair in zip(seeds, resamples, strict=True)
    ]
    assert interval(table) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])))
    # Of one seed it is that of the examples, and of seeds that agree no wider.
    one = rng.normal(0, 1, 4000)
    low, high = interval({1: one})
    assert (low, high) == pytest.approx((-1.96, 1.96), abs=0.15)
    low, high = interval({seed: rng.normal(0, 1, 4000) for seed in range(4)})
    assert high - low == pytest.approx(1.96, abs=0.15), "half: four seeds of independent examples"


def test_intervals_cover_the_truth_and_a_known_effect_is_found():
    """Accuracies of .6 and .8 on shared examples; a third arm is the first one anew."""
    rng, covered, found, false = np.random.default_rng(0), 0, 0, 0
    for _ in range(40):
        differences: dict[str, dict] = {"better": {}, "same": {}}
        for seed in range(5):
            label = rng.integers(0, 2, 200)
            columns = {"task": "rte", "split": "", "example": range(200), "label": label}
            for arm, rate in (("base", 0.6), ("better", 0.8), ("same", 0.6)):
                columns[arm] = np.where(rng.random(200) < rate, label, 1 - label)
            arms = example_resamples(pd.DataFrame(columns), ["base", "better", "same"], 400)
            for arm, each in differences.items():
                each[seed] = arms[arm] - arms["base"]
        low, high = interval(differences["better"])
        covered += low <= 0.2 <= high
        found += low > 0
        low, high = interval(differences["same"])
        false += low > 0 or high < 0
    assert covered >= 34 and found == 40 and false <= 6


def test_both_arms_draw_the_same_examples():
    label = np.arange(N) % 2
    columns = {"task": "rte", "split": "", "example": range(N), "label": label, "a": label % 2}
    frames = [pd.DataFrame({**columns, "a": column}) for column in (label, 1 - label)]
    right, wrong = (example_resamples(frame, ["a"], 50)["a"] for frame in frames)
    assert np.allclose(right, 1) and np.allclose(wrong, 0)
    half = pd.DataFrame({**columns, "a": np.where(np.arange(N) < 20, label, 1 - label)})
    assert np.array_equal(*(example_resamples(half, ["a"], 50)["a"] for _ in range(2)))


def test_the_area_under_a_straight_line_is_its_middle():
    assert area([0.2, 0.5, 1.0], [2.0, 3.5, 6.0]) == pytest.approx(4.0)
    assert area([1, 2], [3, 3]) == pytest.approx(3.0)


# -- verdicts ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "low, high, verdict",
    [
        (0.1, 2, "shows here"),
        (-0.1, 2, "undecided here"),
        (-2, -0.1, "does not show here"),
        (-2, 0, "does not show here"),
    ],
)
def test_a_difference_is_judged_by_its_interval(low, high, verdict):
    assert Difference((low + high) / 2, low, high, (1, 2)).verdict == verdict
    alone = Difference((low + high) / 2, low, high, (1,))
    assert alone.verdict == "undecided here" and str(alone).endswith("one seed")


@pytest.mark.parametrize(
    "low, high, verdict",
    [
        (-0.9, 0.5, "shows here"),
        (-3, 0.5, "undecided here"),
        (-3, -1.1, "does not show here"),
    ],
)
def test_no_worse_than_a_bound(low, high, verdict):
    assert Difference((low + high) / 2, low, high, (1, 2)).above(-1) == verdict


@pytest.mark.parametrize(
    "low, high, sign",
    [(0.1, 2, "higher"), (-2, -0.1, "lower"), (-1, 1, "undecided"), (0, 0, "equal")],
)
def test_a_comparison_that_claims_nothing_says_which_is_higher(low, high, sign):
    assert Difference((low + high) / 2, low, high, (1, 2)).sign == sign


def test_the_interval_of_one_value_a_seed_is_students():
    values = np.random.default_rng(0).normal(size=(4000, 3))
    covers = [low <= 0 <= high for low, high in map(seed_interval, values)]
    assert mean(covers) == pytest.approx(0.95, abs=0.015)
    found = over_seeds({1: 0.01, 2: 0.02, 3: 0.03})
    assert found is not None and found.mean == pytest.approx(2) and found.seeds == (1, 2, 3)
    assert found.high - found.mean == pytest.approx(4.3027 / 3**0.5, rel=1e-4)
    assert over_seeds({1: 0.01}) is None
    # Three seeds that agree are no verdict yet: a quarter of all null effects do.
    assert claims.judged(found)[1] == "undecided here"


# -- the page ----------------------------------------------------------------------------------


def write_run(directory: Path, run: str, seed: int, quality: float, names=NAMES) -> None:
    """A record and predictions of which a share is right, as collect.py writes them."""
    rng = np.random.default_rng([seed, *run.encode()])
    parts, scores = [], {row: {} for row in ROWS}
    for task in names:
        truth = np.random.default_rng([seed, *task.encode()])
        values = truth.integers(0, 2, N) if TASKS[task].labels else truth.uniform(0, 5, N)
        columns = {"task": task, "split": "", "example": range(N), "label": values}
        for row in ROWS:
            right = rng.random(N) < quality - 0.1 * (row == "task_arithmetic")
            columns[row] = np.where(right, values, 1 - values)
            found = task_scores(TASKS[task], columns[row], values)
            scores[row][task] = found[TASKS[task].score]
        parts.append(pd.DataFrame(columns))
    size = len(names)
    matrix = rng.uniform(0.1, 1, (size, size)).tolist()
    record = {
        "run": run,
        "seed": seed,
        "date": "2026-01-02",
        "machine": "x",
        "environment": {"torch": "2"},
        "backbone": "some-model",
        "tasks": names,
        "training": {"seconds": 10.0 + seed},
        "rows": [
            {
                "name": row,
                "knobs": {},
                "scores": scores[row],
                "average": mean(scores[row].values()),
                "normalised_average": 0.5 + seed / 100,
                **({"merge_seconds": 1.0} if row in ROWS[2:] else {}),
            }
            for row in ROWS
        ],
        "search": {
            method: {"grid": [0.1, 1.0], "average": [0.2, quality], "best": 1.0}
            for method in ("task_arithmetic", "ties")
        },
        "interference": {
            **dict.fromkeys(("shift", "overlap"), matrix),
            "energy_before": matrix if seed != 2 else [[None] * size] * size,
            "drift": [0.1] * size,
            "error": {"task_arithmetic": [0.2] * size},
            "layers": {"energy_before": {"a": matrix, "b": matrix}},
        },
    }
    folder = directory / run
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{seed}.json").write_text(json.dumps(record))
    pd.concat(parts).to_parquet(folder / f"{seed}.parquet")


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    for seed in (1, 2, 3):
        for run, quality in (("gaussian", 0.6), ("analytical", 0.9), ("contrastive", 0.9)):
            write_run(folder, run, seed, quality)
        write_run(folder, "analytical+k10", seed, 0.6)
        write_run(folder, "gaussian+2tasks", seed, 0.6, NAMES[:2])
        write_run(folder, "analytical+2tasks", seed, 0.6, NAMES[:2])
    return folder


@pytest.fixture
def results(written, tmp_path, monkeypatch) -> Path:
    """A copy to change; a quarter of the resamples is enough for its verdicts."""
    monkeypatch.setattr("study.example_resamples", partial(example_resamples, resamples=500))
    return Path(shutil.copytree(written, tmp_path / "mine"))


class Page(HTMLParser):
    """What a page asks of the network, and its images without a text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.outside, self.links, self.silent, self.images = [], [], 0, 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.links += [given["href"]] if tag == "a" else []
        self.outside += [
            v
            for k, v in given.items()
            if (k == "src" or (k == "href" and tag != "a")) and not v.startswith("data:")
        ]
        self.images += tag == "img"
        self.silent += tag == "img" and not given.get("alt")


def write_page(directory: Path) -> tuple[str, str]:
    report.write(directory)
    return tuple((directory / f"report.{end}").read_text() for end in ("html", "md"))


def test_the_page_needs_nothing_else_and_says_what_its_pictures_show(results):
    html, text = write_page(results)
    page = Page(html)
    assert not page.outside and not page.silent and page.images == 4
    assert page.links and all((results / link).is_file() for link in page.links)
    assert "url(" not in html and "@import" not in html
    for name in re.findall(r"!\[.*\]\((.*)\)", text):
        assert (results / name).read_bytes().startswith(b"\x89PNG")
    assert "some-model" in html and "viewport" in html and "@media print" in html


def test_a_page_shows_the_tables_of_its_results_between_the_markers(results, tmp_path):
    page = tmp_path / "evidence.md"
    begin, end = (
        f"<!-- {each} of reproduce/results/{results.name} -->" for each in ("begin", "end")
    )
    page.write_text(f"# Mine\n\n{begin}\nold\n{end}\n")
    for _ in range(2):  # what stands there is replaced
        report.write(results, page)
        text = page.read_text()
        study = Study(results)
        shown = [claims.claim_table(study), tables.main_table(study)]
        shown.append(tables.task_table(study, "individual"))
        for head, *lines in shown:
            assert text.count(report.markdown(pd.DataFrame(lines, columns=head))) == 1
        assert text.startswith("# Mine\n") and "old" not in text
        assert text.endswith(f"{end}\n")
    page.write_text("# Mine\n")
    with pytest.raises(report.UserError, match="has no line"):
        report.write(results, page)
    assert page.read_text() == "# Mine\n"


def test_the_manual_has_the_tables_of_the_committed_results():
    """Those without intervals made anew; the others as the report has them."""
    directory = ROOT / "reproduce" / "results" / "embedded"
    begin, end = (f"<!-- {each} of reproduce/results/embedded -->" for each in ("begin", "end"))
    page = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    shown = page.split(begin)[1].split(end)[0]
    kept = (directory / "report.md").read_text()
    assert all(part in kept for part in shown.strip().split("\n\n"))
    study = Study(directory)
    for table in (tables.main_table(study), tables.task_table(study, "individual")):
        part = report.Section("", "", (table,))
        assert report.markdown_tables(part)[0] in shown


def test_every_number_of_the_main_table_follows_from_the_records(results):
    study = Study(results)
    head, *lines = tables.main_table(study)
    assert head == ["", "LoRA", "OSRM", "contrastive (ours)", "merge, s"]
    for row, cells in ((line[0], line[1:-1]) for line in lines[: len(ROWS)]):
        for start, cell in zip(("gaussian", "analytical", "contrastive"), cells, strict=True):
            averages = []
            for seed in (1, 2, 3):
                record = json.loads((results / start / f"{seed}.json").read_text())
                (found,) = (each for each in record["rows"] if each["name"] == row)
                averages.append(100 * mean(found["scores"].values()))
            assert cell == f"{mean(averages):.1f} ± {stdev(averages):.1f}"
    assert [line[-1] for line in lines[: len(ROWS)]] == ["–", "–", "1", "1", "1"]
    assert [line[0] for line in lines[len(ROWS) : -2]] == [*tables.CONSTANTS]
    assert lines[-2:] == [["seeds", "3", "3", "3", "–"], ["training, s", "12", "12", "12", "–"]]


def test_what_was_not_trained_has_no_training_time(results):
    write_run(results, "gaussian+nullify", 1, 0.6)
    path = results / "gaussian+nullify" / "1.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"transform": "nullify"}))
    runs = ["gaussian", "gaussian+nullify", "gaussian+project"]
    assert tables.seconds(Study(results), runs) == ["12", "–", "–"]


def test_a_variation_is_compared_with_the_plain_run_and_the_other_starts(results):
    _, *lines = tables.contrast_table(Study(results), "samples")
    found = {line[0]: line for line in lines}
    plain, lora = "OSRM, k10 − OSRM", "OSRM, k10 − LoRA"
    assert found[plain][1] == "3" and found[plain][-1] == "lower"
    assert found[lora][-1] == "undecided", "two arms of the same quality"
    assert found["OSRM, k1 − OSRM"][1:] == ["–"] * 5 + ["not run yet"]
    names = [other for run, other in tables.contrasts("rank") if run == "analytical+rank2"]
    assert names == ["analytical", "gaussian+rank2", "gaussian-norm1+rank2"]
    assert all(run != other for question in QUESTIONS for run, other in tables.contrasts(question))
    assert ("analytical+2tasks", "analytical") not in tables.contrasts("tasks")


def test_claims_are_judged_by_what_is_there(results):
    found = {line[0]: line for line in claims.claim_table(Study(results))}
    first = found["OSRM's start beats LoRA's, task_arithmetic"]
    assert first[3] == "shows here" and first[2].startswith("+")
    assert found["OSRM's start beats LoRA's, regmean"][2:] == [*claims.MISSING]
    assert found["OSRM's start beats LoRA's, emr"][3] == "shows here"
    (ours,) = (line for claim, line in found.items() if "(ours) beats OSRM's" in claim)
    assert ours[3] == "undecided here", "two arms of the same quality"
    (kept,) = (line for claim, line in found.items() if "within 1 %" in claim)
    assert kept[3] == "shows here" and kept[2].endswith("%")


def test_the_relative_difference_is_that_of_every_seed(results):
    study = Study(results)
    found = study.difference("analytical", "gaussian", "individual", relative=True)
    ours, theirs = (study.values(run, "individual") for run in ("analytical", "gaussian"))
    expected = mean(100 * (ours[seed] / theirs[seed] - 1) for seed in (1, 2, 3))
    assert found is not None and found.mean == pytest.approx(expected)
    assert found.low < found.mean < found.high


def test_the_advantage_grows_by_the_slope_of_each_seed(results):
    for seed, gain in ((1, 0.02), (2, 0.03), (3, 0.04)):
        for run in ("analytical", "analytical+2tasks"):
            path = results / run / f"{seed}.json"
            record = json.loads(path.read_text())
            for row in record["rows"]:
                row["normalised_average"] += gain * len(record["tasks"])
            path.write_text(json.dumps(record))
    measured, _ = claims.grows(Study(results))
    assert measured.startswith("+3.0 [+0.5, +5.5]")


def test_a_constant_has_the_score_of_its_task():
    labels = np.array([0.0, 0, 0, 1, 1])
    assert tables.most_frequent("sst2", labels) == pytest.approx(0.6)
    assert tables.most_frequent("qqp", labels) == pytest.approx(0.3), "no F1 of label 0"
    assert tables.best_constant("qqp", labels) == pytest.approx((0.4 + 4 / 7) / 2)
    for task in ("cola", "stsb"):
        assert tables.most_frequent(task, labels) == tables.best_constant(task, labels) == 0


def test_constants_are_averaged_over_the_seeds(results):
    found = tables.constants(Study(results), tables.most_frequent)
    expected = []
    for seed in (1, 2, 3):
        label = pd.read_parquet(results / "gaussian" / f"{seed}.parquet").query("task == 'mrpc'")
        expected.append(tables.most_frequent("mrpc", label.label.to_numpy(float)))
    assert found == {"mrpc": pytest.approx(mean(expected)), "cola": 0, "stsb": 0}


def test_other_examples_are_not_paired(results):
    path = results / "analytical" / "1.parquet"
    table = pd.read_parquet(path)
    table.loc[0, "label"] = 1 - table.label[0]
    table.to_parquet(path)
    study = Study(results)
    found = study.difference("analytical", "gaussian", "ties")
    assert found is not None and found.seeds == (2, 3)
    (said,) = study.problems
    assert said.startswith("analytical and gaussian, seed 1: other examples or labels")


def test_what_is_not_whole_is_said_and_left_out(results):
    (results / "gaussian" / "1.json").write_text('{"run": "gauss')
    (results / "analytical" / "2.parquet").unlink()
    (results / "analytical" / "3.parquet").write_text("no parquet")
    for path in results.glob("contrastive/*.parquet"):
        path.unlink()
    html, text = write_page(results)
    for name in ("gaussian/1.json", "analytical/2.parquet", "analytical/3.parquet"):
        assert f"{name} is not" in html and f"{name} is not" in text
    assert Study(results).difference("analytical", "gaussian", "ties") is None


def test_runs_that_differ_in_tasks_and_methods_give_a_page(tmp_path):
    write_run(tmp_path / "mine", "gaussian", 1, 0.6, NAMES[:1])
    write_run(tmp_path / "mine", "analytical", 2, 0.6)
    path = tmp_path / "mine" / "gaussian" / "1.json"
    record = json.loads(path.read_text())
    record["rows"] = [row for row in record["rows"] if row["name"] != "task_arithmetic"]
    record["search"], record["interference"]["error"] = {}, {}
    path.write_text(json.dumps(record))
    html, _ = write_page(tmp_path / "mine")
    assert "not run yet" in html


def test_one_run_alone_gives_a_page(tmp_path):
    write_run(tmp_path / "embedded", "orthogonal", 42, 0.7)
    html, _ = write_page(tmp_path / "embedded")
    assert "runs of this study are not there yet" in html and "analytical+k10/43" in html
    assert html.count("orthogonal/42") == html.count('href="orthogonal/42.json"') > 0
    assert "not run yet" in html


def test_no_results_are_one_line(tmp_path):
    code, output = Forked(tmp_path / "printed", "reproduce/report.py", tmp_path).wait()
    assert code == 2 and "run the study first" in output
    assert output.count("\n") == 1
    assert report.VARIED.keys() | {"tasks"} == tables.QUESTIONS.keys()
