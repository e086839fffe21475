"""The page of a study: its statistics, its verdicts, and what it does with half of the results."""

import json
import re
import shutil
import sys
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from statistics import mean, stdev
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy.stats import nct, norm, t, ttest_1samp

from osrm.glue import TASKS, task_scores
from tests.conftest import ROOT, Forked

sys.path.insert(0, str(ROOT / "reproduce"))

import claims
import report
import simulation
import tables
from intervals import Difference, holm, student
from plan import QUESTIONS
from study import Study, area, score

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


def test_both_arms_draw_the_same_examples():
    label = np.arange(N) % 2
    columns = {"task": "rte", "split": "", "label": label}
    half = np.where(np.arange(N) < 20, label, 1 - label)
    frames = [pd.DataFrame({**columns, "ties": arm}) for arm in (label, 1 - label, half, half)]
    right, wrong, one, two = (simulation.resampled_scores(each, ["ties"], 50) for each in frames)
    assert np.allclose(right, 100) and np.allclose(wrong, 0)
    assert np.array_equal(one, two) and one.shape == (1, 1, 50) and one.std() > 0


@pytest.mark.parametrize("bound", [0, 1.2])
def test_the_interval_is_students_of_the_seeds(bound):
    values = dict(enumerate(np.random.default_rng(0).normal(size=5)))
    found = student(values, bound)
    oracle = ttest_1samp([100 * value for value in values.values()], bound)
    assert found is not None and found.p == pytest.approx(oracle.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(oracle.confidence_interval(0.95)))
    assert found.mean == pytest.approx(100 * mean(values.values())) and found.seeds == (*values,)


def test_seeds_that_agree_have_no_noise_and_none_no_interval():
    same, zero = student({1: 0.5, 2: 0.5}), student({1: 0.0, 2: 0.0})
    assert same is not None and (same.low, same.high, same.p) == (50, 50, 0)
    assert zero is not None and (zero.low, zero.high, zero.p) == (0, 0, 1)
    assert student({}) is None


def test_the_correction_is_the_closed_test_of_all_subsets():
    """Holm's p is the largest Bonferroni p of all sets of hypotheses that it is in."""
    rng = np.random.default_rng(3)
    for size in range(1, 7):
        ps = dict(enumerate(rng.uniform(0, 0.2, size)))
        found = holm({name: Difference(1, 0, 2, p, (1, 2)) for name, p in ps.items()})
        sets = [s for n in range(1, size + 1) for s in combinations(ps, n)]
        for name in ps:
            closed = max(len(s) * min(ps[i] for i in s) for s in sets if name in s)
            assert found[name].p == pytest.approx(min(1, closed))
    assert holm({}) == {}


@pytest.fixture(scope="module")
def real() -> list[np.ndarray]:
    """The differences of the committed predictions, examples drawn anew."""
    study = Study(ROOT / "reproduce" / "results" / "embedded")
    pairs = [("contrastive", "gaussian"), ("analytical", "gaussian"), ("contrastive", "analytical")]
    return simulation.resampled_differences(study, pairs, resamples=60)


@pytest.mark.parametrize("seeds", [3, 5, 8, 10])
def test_the_intervals_hold_the_truth_of_studies_like_ours(real, seeds):
    """Seven tasks of 256 examples, from the committed predictions: 95 % do, and of families
    without any difference 5 % show one. More seeds find smaller differences."""
    assert real[0].shape == (5, 7, 12, 60)
    found = simulation.reliability(real, seeds)
    assert all(0.93 <= share <= 0.97 for share in found.coverage)
    assert all(share <= 0.07 for share in found.false)
    assert simulation.reliability(real, seeds + 2).alone < found.alone < found.corrected


def test_too_narrow_an_interval_is_noticed(real, monkeypatch):
    normal = SimpleNamespace(ppf=lambda share, freedom: norm.ppf(share))
    monkeypatch.setattr(simulation, "t", normal)
    for seeds, most in ((3, 0.85), (5, 0.91)):
        found = simulation.reliability(real, seeds)
        assert max(found.coverage) < most and min(found.false) > 0.1


def test_a_difference_is_found_in_four_of_five_studies():
    """Of normal differences of standard deviation 1: the power of Student's test."""
    rng = np.random.default_rng(0)
    normal = rng.normal(size=(400, 1, 1, 400))
    found = simulation.reliability([normal], 5)
    power = nct.sf(t.ppf(0.975, 4), 4, found.alone * 5**0.5)
    assert power == pytest.approx(0.8, abs=0.03)


def test_curves_have_the_scales_that_all_runs_tried():
    def run(**average):
        grid = [float(scale[1:]) for scale in average]
        return {"search": {"ties": {"grid": grid, "average": [*average.values()]}, "emr": {}}}

    records = {"a": {1: run(x1=3, x2=4, x3=5), 2: run(x1=6, x2=7)}, "b": {1: run(x1=8, x2=9)}}
    records["c"] = {1: {"search": {}}}
    study = SimpleNamespace(records=records)
    assert tables.curves(study, "a", "ties") == {1: ([1, 2], [3, 4]), 2: ([1, 2], [6, 7])}
    assert tables.curves(study, "c", "ties") == tables.curves(study, "a", "tsv") == {}


def test_the_area_under_a_straight_line_is_its_middle():
    assert area([0.2, 0.5, 1.0], [2.0, 3.5, 6.0]) == pytest.approx(4.0)
    assert area([1, 2], [3, 3]) == pytest.approx(3.0)


# -- verdicts ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mean, p, bound, verdict",
    [
        (1, 0.049, 0, "shows here"),
        (1, 0.05, 0, "undecided here"),
        (-1, 0.049, 0, "does not show here"),
        (-0.5, 0.01, -1, "shows here"),
        (-2, 0.01, -1, "does not show here"),
        (-2, 0.5, -1, "undecided here"),
    ],
)
def test_a_difference_is_judged_by_its_corrected_p(mean, p, bound, verdict):
    found = Difference(mean, mean - 1, mean + 1, p, (1, 2), bound)
    assert found.verdict == verdict
    assert str(found).endswith(" *") == (verdict != "undecided here")


def test_one_seed_decides_nothing():
    found = student({1: 0.5})
    assert found is not None and found.verdict == "undecided here"
    assert str(found) == "+50.0, one seed"


def test_the_methods_of_a_comparison_are_a_family(results):
    study = Study(results)
    found = study.differences("contrastive", "analytical")
    raw = {}
    for row in found:
        ours, theirs = (study.values(run, row) for run in ("contrastive", "analytical"))
        raw[row] = student({seed: ours[seed] - theirs[seed] for seed in (1, 2, 3)})
    methods = ROWS[2:]
    assert {row: found[row].p for row in methods} == {
        row: each.p for row, each in holm({row: raw[row] for row in methods}).items()
    }
    assert found["individual"] == raw["individual"], "no method, no family"
    assert [*found] == ROWS[:2] + sorted(methods, key=lambda row: raw[row].p)


def test_the_loss_and_the_averages_without_a_task_follow_from_the_scores(results):
    study = Study(results)
    record = json.loads((results / "gaussian" / "1.json").read_text())
    scores = {row["name"]: row["scores"] for row in record["rows"]}
    for row in ROWS[2:]:
        loss = mean(scores["individual"].values()) - mean(scores[row].values())
        assert study.values("gaussian", row, "loss")[1] == pytest.approx(loss)
    without = mean([scores["ties"]["mrpc"], scores["ties"]["cola"]])
    assert study.values("gaussian", "ties", "without stsb")[1] == pytest.approx(without)
    assert study.values("gaussian", "individual", "loss") == {}


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
    """A copy to change; few simulated studies are enough."""
    monkeypatch.setattr("simulation.STUDIES", 50)
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
        shown += [tables.difference_table(study), tables.reliability_table(study)]
        shown.append(tables.task_table(study, "individual"))
        for head, *lines in shown:
            assert text.count(report.markdown(pd.DataFrame(lines, columns=head))) == 1
        assert text.startswith("# Mine\n") and "old" not in text
        assert text.endswith(f"{end}\n")
    page.write_text("# Mine\n")
    with pytest.raises(report.UserError, match="has no line"):
        report.write(results, page)
    assert page.read_text() == "# Mine\n"


PAGES = {"docs/evidence.md": ["converged"], "docs/short-training.md": ["embedded"]}
"""The studies that a page speaks of."""
NAMING = PAGES | {
    "README.md": ["converged", "embedded"],
    "docs/transform.md": ["embedded"],
}


@pytest.mark.parametrize("page", PAGES)
def test_the_manual_has_the_tables_of_the_committed_results(page):
    """Those without intervals made anew; the others as the report has them."""
    (name,) = PAGES[page]
    directory = ROOT / "reproduce" / "results" / name
    begin, end = (f"<!-- {each} of reproduce/results/{name} -->" for each in ("begin", "end"))
    shown = (ROOT / page).read_text(encoding="utf-8").split(begin)[1].split(end)[0]
    kept = (directory / "report.md").read_text()
    assert all(part in kept for part in shown.strip().split("\n\n"))
    study = Study(directory)
    for table in (tables.main_table(study), tables.task_table(study, "individual")):
        assert report.markdown_section(report.Section("", "", (table,)))[-1] in shown


@pytest.mark.parametrize("page", NAMING)
def test_every_difference_that_a_page_names_is_in_the_report(page):
    """Whoever runs more seeds learns which sentences to write anew."""
    reports = [ROOT / "reproduce" / "results" / name / "report.md" for name in NAMING[page]]
    kept = "".join(path.read_text() for path in reports)
    text = (ROOT / page).read_text(encoding="utf-8").replace("−", "-")
    # These are measured on other adapters.
    text = re.sub(r"^## Later methods.*?(?=^## )", "", text, flags=re.MULTILINE | re.DOTALL)
    named = re.findall(r"\d+\.\d+ ± \d+\.\d+|[+-]\d+\.\d \[[^]]*\](?: \*)?", text)
    assert named and {each for each in named if each not in kept} == set()


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
            text = f"{mean(averages):.1f} ± {stdev(averages):.1f}"
            losses = study.values(start, row, "loss").values()
            assert cell == (f"{text} ({100 * mean(losses):.1f})" if losses else text)
    assert [line[-1] for line in lines[: len(ROWS)]] == ["–", "–", "1", "1", "1"]
    assert [line[0] for line in lines[len(ROWS) : -2]] == [*tables.CONSTANTS]
    assert lines[-2:] == [["seeds", "3", "3", "3", "–"], ["training, s", "12", "12", "12", "–"]]


def test_what_was_not_trained_has_no_training_time(results):
    write_run(results, "gaussian+nullify", 1, 0.6)
    path = results / "gaussian+nullify" / "1.json"
    record = json.loads(path.read_text())
    del record["training"]["seconds"]
    path.write_text(json.dumps(record))
    runs = ["gaussian", "gaussian+nullify", "gaussian+project"]
    assert tables.seconds(Study(results), runs) == ["12", "–", "–"]


def test_a_variation_is_compared_with_the_plain_run_and_the_other_starts(results):
    head, *lines = tables.contrast_table(Study(results), "samples")
    assert head == ["", "seeds", "single task", "task arithmetic", "TIES", "EMR"]
    found = {line[0]: line for line in lines}
    plain, lora = "OSRM, k10 − OSRM", "OSRM, k10 − LoRA"
    assert found[plain][1] == "3" and re.fullmatch(r"-.*, -.*\] \*", found[plain][2])
    assert all("*" not in cell for cell in found[lora]), "two arms of the same quality"
    assert found["OSRM, k1 − OSRM"][1:] == ["not run yet"] + ["–"] * 4
    names = [other for run, other in tables.contrasts("rank") if run == "analytical+rank2"]
    assert names == ["analytical", "gaussian+rank2", "gaussian-norm1+rank2"]
    assert all(run != other for question in QUESTIONS for run, other in tables.contrasts(question))
    assert ("analytical+2tasks", "analytical") not in tables.contrasts("tasks")


def test_claims_are_judged_by_what_is_there(results):
    study = Study(results)
    head, *lines = claims.claim_table(study)
    found = {line[0]: dict(zip(head, line, strict=True)) for line in lines}
    first = found["OSRM's start beats LoRA's, task_arithmetic"]
    differences = study.differences("analytical", "gaussian")
    assert first["measured here"] == str(differences["task_arithmetic"])
    assert first["verdict"] == "shows here"
    assert first["without stsb"] == str(
        study.differences("analytical", "gaussian", "without stsb")["task_arithmetic"]
    )
    rest = [study.differences("analytical", "gaussian", f"without {task}") for task in NAMES]
    least = min((each["task_arithmetic"] for each in rest), key=lambda each: each.mean)
    assert first["least without one task"].startswith(str(least))
    loss = study.differences("analytical", "gaussian", "loss")["task_arithmetic"]
    assert first["merging loss"] == str(loss)
    missing = found["OSRM's start beats LoRA's, regmean"]
    assert missing["verdict"] == "not run yet" and missing["measured here"] == "–"
    ours = found["the contrastive start (ours) beats OSRM's, task_arithmetic"]
    assert ours["verdict"] == "undecided here", "two arms of the same quality"
    kept = found["single-task scores within 1 % of LoRA's"]
    assert kept["verdict"] == "shows here" and kept["measured here"].startswith("+")


def test_the_relative_difference_is_that_of_every_seed(results):
    study = Study(results)
    found = claims.relative(study, bound=-1)
    ours, theirs = (study.values(run, "individual") for run in ("analytical", "gaussian"))
    assert found == student({seed: ours[seed] / theirs[seed] - 1 for seed in (1, 2, 3)}, -1)


def test_the_advantage_grows_by_the_slope_of_each_seed(results):
    for seed, gain in ((1, 0.02), (2, 0.03), (3, 0.04)):
        for run in ("analytical", "analytical+2tasks"):
            path = results / run / f"{seed}.json"
            record = json.loads(path.read_text())
            for row in record["rows"]:
                row["normalised_average"] += gain * len(record["tasks"])
            path.write_text(json.dumps(record))
    assert str(claims.growth(Study(results))).startswith("+3.0 [+0.5, +5.5]")


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
    assert study.differences("analytical", "gaussian")["ties"].seeds == (2, 3)
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
    assert Study(results).differences("analytical", "gaussian") == {}


def test_runs_that_differ_in_tasks_and_methods_give_a_page(tmp_path):
    write_run(tmp_path / "mine", "gaussian", 1, 0.6, NAMES[:1])
    write_run(tmp_path / "mine", "analytical", 2, 0.6)
    path = tmp_path / "mine" / "gaussian" / "1.json"
    record = json.loads(path.read_text())
    record["rows"] = [row for row in record["rows"] if row["name"] != "task_arithmetic"]
    record["search"] = {}
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
