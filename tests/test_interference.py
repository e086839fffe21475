"""Every number of a diagnosis against brute force on the vectors themselves, in float64."""

import json
import math
import weakref
from collections.abc import Mapping

import numpy as np
import pytest
import scipy.linalg
import torch

from osrm.errors import UserError
from osrm.interference import (
    diagnose,
    drift,
    overlap,
    relative_energy,
    row_space,
    squared_norm,
    squared_shift,
)
from osrm.moments import Moment
from osrm.report import diagnosis_tables, heat_map, layer_plot
from osrm.task_vectors import LoraPair, TaskVectors

TASKS = ("rte", "cola", "sst2")
MODULES = ("layer.0.value", "layer.0.query", "layer.1.value", "layer.1.query")
OUT, D, RANK = 5, 12, 3
COUNTS = {"rte": 7, "cola": 40, "sst2": 12}
"""Vectors of each task: fewer than D stay as they are, others become a sum."""
METHODS = ("average", "ties")


def gaussian(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pair(seed, rank=RANK, scaling=2.0):
    return LoraPair(gaussian(rank, D, seed=seed), gaussian(OUT, rank, seed=seed + 1000), scaling)


def key(task, module):
    return 10 * TASKS.index(task) + MODULES.index(module)


def inputs(task, module):
    return gaussian(COUNTS[task], D, seed=key(task, module)) + TASKS.index(task)


def arguments(tasks=TASKS):
    """A small case of every kind of thing: both forms of a moment, ranks that differ."""
    found = {
        "updates": {t: {m: pair(100 + key(t, m)) for m in MODULES} for t in tasks},
        "moments": {t: {m: Moment.of(inputs(t, m)) for m in MODULES} for t in tasks},
        "weights": lambda module: gaussian(OUT, D, seed=300 + MODULES.index(module)),
        "starts": {t: {m: gaussian(RANK, D, seed=400 + key(t, m)) for m in MODULES} for t in tasks},
        "merged": {
            method: {
                t: {m: gaussian(OUT, D, seed=500 + 100 * k + key(t, m)) for m in MODULES}
                for t in tasks
            }
            for k, method in enumerate(METHODS)
        },
    }
    if "cola" in tasks:
        found["updates"]["cola"]["layer.1.query"] = pair(7, rank=2)
        found["starts"]["cola"]["layer.1.query"] = gaussian(2, D, seed=8)
    return found


def f64(tensor):
    return tensor.double().numpy()


def frobenius(matrices):
    return math.sqrt(sum((matrix**2).sum() for matrix in matrices))


def close(found, expected, tolerance=1e-6):
    np.testing.assert_allclose(np.asarray(found), expected, rtol=tolerance, atol=1e-12)


def check(quantity, expected):
    """`expected(modules)` is brute force on the modules together: on each alone, and on all."""
    close(quantity.modules, [expected([module]) for module in MODULES])
    close(quantity.overall, expected(MODULES))


def table(entry):
    return np.array([[entry(i, j) for j in TASKS] for i in TASKS])


def output_norm(weights, task, modules):
    return frobenius([f64(w) @ f64(inputs(task, m)).T for w, m in zip(weights, modules)])


@pytest.fixture(scope="module")
def case():
    given = arguments()
    return given, diagnose(**given)


def test_the_case_has_moments_of_both_forms():
    forms = {Moment.of(inputs(task, MODULES[0])).is_rows for task in TASKS}
    assert forms == {True, False}


def test_shifts(case):
    given, found = case

    def relative(modules):
        # Each module has as many vectors of a task: sums of means are to each other as sums.
        frozen = [given["weights"](m) for m in modules]
        return table(
            lambda i, j: (
                output_norm([given["updates"][i][m].delta for m in modules], j, modules)
                / output_norm(frozen, j, modules)
            )
        )

    assert found.tasks == TASKS and found.modules == MODULES
    check(found.shift, relative)
    overall = relative(MODULES)
    ratios = [np.delete(overall[i], i).mean() / overall[i, i] for i in range(3)]
    assert found.cross_over_own == pytest.approx(np.mean(ratios), rel=1e-6)


@pytest.mark.parametrize("task", TASKS)
def test_the_shift_is_a_mean_over_vectors(task):
    X, lora = inputs(task, MODULES[0]), pair(2)
    expected = ((f64(lora.delta) @ f64(X).T) ** 2).sum() / len(X)
    assert squared_shift(lora, Moment.of(X)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("scaling", [2.0, 0.5, -1.0])
@pytest.mark.parametrize("task", TASKS)
def test_factors_equal_dense(task, scaling):
    moment, lora = Moment.of(inputs(task, MODULES[0])), pair(3, scaling=scaling)
    assert squared_shift(lora, moment) == pytest.approx(squared_shift(lora.delta, moment), rel=1e-6)
    fetched = squared_shift(lambda: lora.delta, moment)
    assert fetched == squared_shift(lora.delta, moment)
    assert squared_norm(lora) == pytest.approx(squared_norm(lora.delta), rel=1e-6)


def test_factors_are_never_made_dense_to_shift(monkeypatch):
    monkeypatch.setattr(LoraPair, "delta", property(lambda self: pytest.fail("made dense")))
    monkeypatch.setattr(Moment, "gram", property(lambda self: pytest.fail("made a gram")))
    assert squared_shift(pair(0), Moment.of(inputs("rte", MODULES[0]))) > 0
    assert squared_norm(pair(0)) > 0


def test_dense_updates_give_the_same_diagnosis_but_for_A(case):
    given, factors = case
    updates = {
        "rte": {m: each.delta for m, each in given["updates"]["rte"].items()},
        "cola": {m: lambda each=each: each.delta for m, each in given["updates"]["cola"].items()},
        "sst2": given["updates"]["sst2"],
    }
    found = diagnose(**given | {"updates": updates})
    close(found.shift.modules, factors.shift.modules)
    close(found.norm.modules, factors.norm.modules)
    close(found.sign_conflict.overall, factors.sign_conflict.overall)
    close(found.merge_error["ties"].overall, factors.merge_error["ties"].overall)
    assert found.drift.overall.isnan().tolist() == [True, True, False]
    assert found.overlap.overall.isfinite().sum() == 1


def test_energy_before_training(case):
    given, found = case

    def entry(i, j, m):
        A, X = f64(given["starts"][i][m]), f64(inputs(j, m))
        return ((A @ X.T) ** 2).sum() / ((A**2).sum() * (X**2).sum() / D)

    tables = [table(lambda i, j, m=m: entry(i, j, m)) for m in MODULES]
    close(found.energy_before.modules, tables)
    close(found.energy_before.overall, np.mean(tables, 0))


@pytest.mark.parametrize("task", TASKS)
def test_energy_of_a_frame_is_its_mean_rayleigh_quotient(task):
    X = f64(inputs(task, MODULES[0]))
    values, vectors = np.linalg.eigh(X.T @ X / len(X))
    frame = torch.from_numpy(vectors[:, -3:].T.copy())
    found = relative_energy(frame, Moment.of(torch.from_numpy(X)))
    assert found == pytest.approx(values[-3:].mean() / values.mean(), rel=1e-6)
    whole = torch.from_numpy(vectors.T.copy())
    assert relative_energy(whole, Moment.of(torch.from_numpy(X))) == pytest.approx(1)


def test_random_directions_have_energy_one():
    moment = Moment.of(inputs("cola", MODULES[0]))
    energies = [relative_energy(gaussian(4, D, seed=seed), moment) for seed in range(2000)]
    assert np.mean(energies) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("method", METHODS)
def test_merge_errors(case, method):
    given, found = case

    def relative(modules):
        frozen = [given["weights"](m) for m in modules]
        wrong = {
            t: [given["merged"][method][t][m] - given["updates"][t][m].delta for m in modules]
            for t in TASKS
        }
        return [output_norm(wrong[t], t, modules) / output_norm(frozen, t, modules) for t in TASKS]

    assert tuple(found.merge_error) == METHODS
    check(found.merge_error[method], relative)


def test_a_merge_that_is_the_own_update_has_no_error(case):
    given, _ = case
    stack = TaskVectors.stack(given["updates"])
    merged = {t: {m: stack[m][i] for m in MODULES} for i, t in enumerate(TASKS)}
    found = diagnose(**given | {"merged": {"itself": merged}})
    assert found.merge_error["itself"].overall.eq(0).all()


def test_overlap(case):
    given, found = case

    def median(i, j, module):
        spaces = [f64(given["updates"][t][module].A).T for t in (i, j)]
        return np.median(np.cos(scipy.linalg.subspace_angles(*spaces)))

    tables = [table(lambda i, j, m=m: median(i, j, m)) for m in MODULES]
    close(found.overlap.modules, tables)
    close(found.overlap.overall, np.median(tables, 0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_row_space_of_a_rank_deficient_A(dtype):
    few = gaussian(2, 64, seed=0)
    A = torch.cat([few, few[:1] * 4, few[:1] * 0]).to(dtype)  # exact in every type
    basis = row_space(A)
    assert basis.shape == (2, 64) and basis.dtype == torch.float64
    close(basis @ basis.T, np.eye(2))
    close(A.double() @ basis.T @ basis, f64(A), 1e-5)
    mixed = row_space(gaussian(8, 2, seed=1) @ few)  # rounded in float32: the rank stays two
    assert mixed.shape == (2, 64)
    assert overlap(mixed, row_space(few)) == pytest.approx(1, abs=1e-6)


def test_overlap_of_special_spaces():
    axes = torch.eye(6).double()
    assert overlap(axes[:2], axes[2:5]) == 0
    assert overlap(axes[:1], axes[:4]) == 1
    assert overlap(axes[:2], axes[1:3]) == 0.5  # cosines 0 and 1
    assert math.isnan(overlap(axes[:2], axes[:0]))
    assert row_space(torch.zeros(3, 6)).shape == (0, 6)


def test_sign_conflict(case):
    given, found = case

    def share(modules):
        flat = {
            t: np.concatenate([f64(given["updates"][t][m].delta).ravel() for m in modules])
            for t in TASKS
        }
        return table(lambda i, j: np.mean(flat[i] * flat[j] < 0))

    check(found.sign_conflict, share)
    assert found.sign_conflict.overall.diagonal().eq(0).all()


def test_entries_at_zero_do_not_conflict():
    rows = {"rte": [1.0, -1.0, 0.0, 2.0, 0.0], "cola": [-3.0, -1.0, 1.0, 1.0, 0.0]}
    updates = {t: {"w": torch.tensor([row])} for t, row in rows.items()}
    moments = {t: {"w": Moment.of(torch.ones(2, 5))} for t in rows}
    found = diagnose(updates, moments, lambda _: torch.ones(1, 5))
    close(found.sign_conflict.overall, [[0, 1 / 3], [1 / 3, 0]])


def test_drift(case):
    given, found = case

    def ends(modules):
        for t in TASKS:
            before = [f64(given["starts"][t][m]) for m in modules]
            after = [f64(given["updates"][t][m].A) for m in modules]
            yield before, after

    def relative(modules):
        return [
            frobenius([a - b for a, b in zip(after, before)]) / frobenius(before)
            for before, after in ends(modules)
        ]

    def inside(modules):
        return [
            (
                frobenius([a @ np.linalg.pinv(b) @ b for a, b in zip(after, before)])
                / frobenius(after)
            )
            ** 2
            for before, after in ends(modules)
        ]

    check(found.drift, relative)
    check(found.kept_in_start, inside)


def test_drift_of_special_matrices():
    A = gaussian(3, 6, seed=0)
    norm = float(A.double().square().sum())
    assert drift(A, A) == pytest.approx((0, norm, norm, norm))
    assert drift(A, 3 * A) == pytest.approx((4 * norm, norm, 9 * norm, 9 * norm))
    assert drift(A[:, :0].new_zeros(0, 6), A) == (0, 0, 0, 0)


def test_norms(case):
    given, found = case
    check(
        found.norm,
        lambda modules: [
            frobenius([f64(given["updates"][t][m].delta) for m in modules]) for t in TASKS
        ],
    )


def test_a_module_that_a_task_lacks_is_a_zero_update():
    given = arguments()
    lacking, zero = (
        {task: dict(updates) for task, updates in given["updates"].items()} for _ in range(2)
    )
    lora = lacking["cola"].pop("layer.0.query")
    zero["cola"]["layer.0.query"] = LoraPair(lora.A, lora.B * 0, lora.scaling)
    del given["starts"]["cola"]["layer.0.query"]
    left_out, zeroed = (diagnose(**given | {"updates": each}) for each in (lacking, zero))
    close(left_out.shift.overall, zeroed.shift.overall)
    close(left_out.norm.overall, zeroed.norm.overall)
    close(left_out.merge_error["average"].overall, zeroed.merge_error["average"].overall)
    close(left_out.sign_conflict.overall, zeroed.sign_conflict.overall)
    assert left_out.shift.modules[1, 1].eq(0).all()
    # It has no A either: the other modules speak for the task.
    present = [0, 2, 3]
    close(left_out.energy_before.overall[1], left_out.energy_before.modules[present, 1].mean(0))
    assert left_out.drift.modules[1, 1].isnan() and left_out.drift.overall.isfinite().all()
    assert left_out.overlap.overall.isfinite().all()


def test_modules_are_in_the_order_of_the_updates():
    given = arguments()
    del given["updates"]["rte"]["layer.0.value"]
    assert diagnose(**given).modules == (*MODULES[1:], MODULES[0])


def test_zero_updates_have_no_nan():
    given = arguments()
    for module, lora in given["updates"]["rte"].items():
        given["updates"]["rte"][module] = LoraPair(lora.A, lora.B * 0, lora.scaling)
    found = diagnose(**given)
    assert found.shift.modules[:, 0].eq(0).all() and found.norm.overall[0] == 0
    for each in (
        found.energy_before,
        found.drift,
        found.kept_in_start,
        found.overlap,
        *found.merge_error.values(),
    ):
        assert each.overall.isfinite().all()
    overall = found.shift.overall
    ratios = [
        (overall[1, 0] + overall[1, 2]) / 2 / overall[1, 1],
        (overall[2, 0] + overall[2, 1]) / 2 / overall[2, 2],
    ]
    assert found.cross_over_own == pytest.approx(np.mean(ratios))


def test_directions_without_energy():
    """A difference of moments leaves rounding of either sign where there was no energy."""
    axes = torch.eye(D).double()
    energies = {"rte": [1.0] * (D - 1) + [-1e-18], "cola": [1.0] * D, "sst2": [2.0] * D}
    moments = {t: {"w": Moment(D, torch.diag(torch.tensor(each)))} for t, each in energies.items()}
    updates = {t: {"w": LoraPair(axes[-1:], gaussian(OUT, 1, seed=1), 2.0)} for t in energies}
    found = diagnose(updates, moments, lambda _: gaussian(OUT, D, seed=0))
    assert squared_shift(updates["rte"]["w"], moments["rte"]["w"]) < 0
    assert found.shift.overall[:, 0].eq(0).all()
    # rte's leaves its own task alone: no ratio. The others shift each other as themselves, and rte
    # not at all.
    assert found.cross_over_own == pytest.approx(0.5)


def test_nothing_to_diagnose_is_refused():
    with pytest.raises(UserError, match="no task updates a module"):
        diagnose({"rte": {}}, {"rte": {}}, lambda _: torch.ones(1, 1))


class FromDisk(Mapping):
    """Moments made anew at each look-up, which notes how many are alive."""

    def __init__(self, task, alive, counts):
        self.task, self.alive, self.counts = task, alive, counts

    def __getitem__(self, module):
        moment = Moment.of(inputs(self.task, module))
        self.alive.add(moment)
        self.counts.append(len(self.alive))
        return moment

    def __iter__(self):
        return iter(MODULES)

    def __len__(self):
        return len(MODULES)


def test_the_moments_of_one_module_are_held_at_a_time(case):
    given, found = case
    alive, counts = weakref.WeakSet(), []
    moments = {task: FromDisk(task, alive, counts) for task in TASKS}
    again = diagnose(**given | {"moments": moments})
    assert max(counts) == len(TASKS)
    assert again.record() == found.record()


def strict(value):
    """The JSON of a record, which no NaN or infinity may be in."""
    return json.loads(json.dumps(value, allow_nan=False))


def test_the_record_is_json_of_all_numbers(case):
    _, found = case
    record = strict(found.record())
    assert record["tasks"] == list(TASKS) and record["modules"] == list(MODULES)
    close(record["shift"]["overall"], found.shift.overall)
    close(record["shift"]["modules"]["layer.1.value"], found.shift.modules[2])
    assert record["cross_over_own"] == found.cross_over_own
    close(record["energy_before"]["overall"], found.energy_before.overall)
    close(record["merge_error"]["ties"]["overall"], found.merge_error["ties"].overall)
    assert len(record) == 11


@pytest.mark.parametrize("tasks", [TASKS, TASKS[:1]])
@pytest.mark.parametrize("without", [(), ("starts",), ("starts", "merged")])
def test_records_tables_and_plots_of_little(tasks, without, tmp_path):
    given = {name: each for name, each in arguments(tasks).items() if name not in without}
    found = diagnose(**given)
    record = strict(found.record())
    assert record["shift"]["overall"][0][0] > 0
    if len(tasks) == 1:
        assert record["cross_over_own"] is None
    if "starts" in without:
        assert record["drift"]["overall"] == [None] * len(tasks)
    text = diagnosis_tables(found)
    assert "nan" not in text and text.count("|:--") == (2 if "merged" in without else 3)
    for number, draw in enumerate((heat_map, layer_plot)):
        path = tmp_path / f"{number}.png"
        draw(found, path)
        assert path.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.png", "1.png"]


def cells(text, number):
    """The rows of the Markdown table of that number, head first."""
    block = [part for part in text.split("\n\n") if part.startswith("|")][number]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
    return [rows[0], *rows[2:]]


def test_tables(case):
    _, found = case
    text = diagnosis_tables(found)
    for number in range(3):
        widths = {len(line) for line in text.split("\n\n")[2 * number].splitlines()}
        assert len(widths) == 1  # aligned
    shift = cells(text, 0)
    assert shift[0][1:] == list(TASKS) and [row[0] for row in shift[1:]] == list(TASKS)
    assert shift[2][3] == f"{100 * found.shift.overall[1, 2]:.3g}"
    head, *rows = cells(text, 1)
    row = dict(zip(head, rows[1]))
    overall = found.energy_before.overall[1]
    assert row["adapter"] == "cola"
    assert row["energy, own"] == f"{overall[1]:.3g}"
    assert row["energy, others"] == f"{(overall[0] + overall[2]) / 2:.3g}"
    assert row["shift, own"] == shift[2][2]
    assert row["norm"] == f"{found.norm.overall[1]:.3g}"
    overlaps = found.overlap.overall[1]
    assert row["A overlap"] == f"{(overlaps[0] + overlaps[2]) / 2:.3g}"
    error = found.merge_error["ties"].overall
    assert cells(text, 2)[2] == ["ties", *(f"{100 * each:.3g}" for each in [*error, error.mean()])]


def test_the_layer_plot_has_a_line_for_own_and_others_of_each_projection(
    case, tmp_path, monkeypatch
):
    _, found = case
    figures = []
    monkeypatch.setattr("osrm.report.save", lambda figure, path: figures.append(figure))
    layer_plot(found, tmp_path / "plot.png")
    lines = {line.get_label(): line.get_ydata() for line in figures[0].axes[0].lines}
    assert list(lines) == ["value, own", "value, others", "query, own", "query, others"]
    relative = 100 * found.shift.modules[[1, 3]]
    own = relative.diagonal(dim1=1, dim2=2).sum(1)
    close(lines["query, own"], own / 3)
    close(lines["query, others"], (relative.sum((1, 2)) - own) / 6)
