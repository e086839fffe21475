"""What a GPU computes is what the CPU computes, up to rounding; and the CPU seldom waits for it.

`pytest -m gpu` runs these tests on a GPU. Without one, a pretended GPU takes its place where
tensors are all that matters, and the CPU itself where the Trainer or autocast needs a real device.
"""

import copy
import json
import signal
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from osrm.adapters import add_lora, read_adapter
from osrm.backbones import projections
from osrm.commands.train import train
from osrm.data import load_task, tokenize
from osrm.errors import Interrupted
from osrm.evaluation import predict
from osrm.features import collect
from osrm.fisher import fisher_information
from osrm.glue import TASKS
from osrm.interference import diagnose
from osrm.lending import applied, linear_weight
from osrm.merging import METHODS, Masked, _updates, merge
from osrm.moments import Moment
from osrm.runs import run_dir
from osrm.starts import STARTS, StartConfig, starts
from osrm.subspace import contrastive_subspace, minor_subspace
from osrm.task_vectors import LoraPair, TaskVectors
from osrm.training import LOOK, TaskTrainer, enable_checkpointing
from osrm.transforms import nullify
from tests.conftest import CONFIGS, Forked, make_adapter, make_tokenizer, merge_them, small
from tests.pretended_gpu import GPU, Calls, pretended_gpu

REAL = pytest.param("cuda", marks=pytest.mark.gpu)
FAMILIES = ["roberta", "t5", "llama"]


class Device:
    """A GPU, real or pretended; `waits` notes where osrm's code waited for the pretended one."""

    def __init__(self, device: torch.device, waits: list[str]) -> None:
        self.device, self.waits = device, waits

    def per(self, run, few: int, many: int) -> Counter:
        """How often the CPU waits more, and where, if `run` has `many` steps instead of `few`."""
        counts = []
        for steps in (few, many):
            self.waits.clear()
            run(steps)
            counts.append(Counter(self.waits))
        return counts[1] - counts[0]


@pytest.fixture(params=["pretended", REAL])
def gpu(request):
    with ExitStack() as stack:
        if request.param == "cuda":
            yield Device(torch.device("cuda"), [])
        else:
            yield Device(GPU, stack.enter_context(pretended_gpu()))


@pytest.fixture(params=["cpu", REAL])
def real(request) -> str:
    """A device that the Trainer and autocast know."""
    return request.param


def host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu")


def assert_near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """‖found - expected‖ ≤ tolerance · ‖expected‖."""
    found, expected = host(found).double(), host(expected).double()
    assert found.shape == expected.shape
    assert float((found - expected).norm()) <= tolerance * float(expected.norm())


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


# ------------------------------------------------------------------ statistics and subspaces

D, RANK = 64, 4


def planted(seed: int, count: int = 4 * D) -> Tensor:
    """Vectors whose energies go from 1 down to 1e-10 of the largest, on axes of the seed."""
    axes = torch.linalg.qr(gaussian(D, D, seed=seed).double())[0]
    energies = torch.logspace(0, -10, D, dtype=torch.float64)
    rows = gaussian(count, D, seed=seed + 1).double() * energies.sqrt()
    return (rows @ axes.T).float()


def test_energies_far_below_the_largest_are_seen(gpu):
    """The minor subspace has the least energy of all, by numpy in float64: 1e-10 of the largest.

    With float32 sums it has more than ten times as much.
    """
    rows = planted(0)
    S = np.float64(rows.numpy()).T @ np.float64(rows.numpy())
    values = np.linalg.eigvalsh(S)
    least = values[:RANK].sum()
    assert least < 1e-9 * values[-1]

    A = host(minor_subspace(Moment.of(rows.to(gpu.device)), RANK, generator())).numpy()
    assert np.trace(A @ S @ A.T) == pytest.approx(least, rel=1e-3)
    A = np.linalg.eigh(np.float64((rows.T @ rows).numpy()))[1][:, :RANK].T
    assert np.trace(A @ S @ A.T) > 10 * least


@pytest.mark.parametrize("count", [D // 2, 2 * D])
def test_statistics_add_subtract_multiply_and_invert(gpu, count):
    rows, more = planted(0, count), planted(1, D // 2)
    here = Moment.of(rows) + Moment.of(more)
    there = Moment.of(rows.to(gpu.device)) + Moment.of(more).to(gpu.device)
    assert there.data.device.type == gpu.device.type
    x = gaussian(D, 3).double()
    y = x.to(gpu.device)
    assert_near(there.gram, here.gram, 1e-14)
    assert_near((there - Moment.of(more).to(gpu.device)).gram, Moment.of(rows).gram, 1e-12)
    assert_near(there.times(y), here.times(x), 1e-13)
    assert_near(there.shifted_inverse(1e-3)(y), here.shifted_inverse(1e-3)(x), 1e-11)
    assert there.energy(y.T) == pytest.approx(here.energy(x.T), rel=1e-12)
    assert there.mean_energy == pytest.approx(here.mean_energy, rel=1e-12)


def projector(A: Tensor) -> Tensor:
    return torch.linalg.pinv(host(A).double()) @ host(A).double()


def test_subspaces(gpu):
    own, others = (Moment.of(planted(seed)) for seed in (0, 5))
    own_there, others_there = own.to(gpu.device), others.to(gpu.device)
    gpu.waits.clear()
    minor = minor_subspace(others_there, RANK, generator())
    # One look at each step of the iteration says whether it has converged.
    assert Counter(gpu.waits)["subspace.py: _lowest: __bool__"] <= D / RANK
    assert_near(projector(minor), projector(minor_subspace(others, RANK, generator())), 1e-5)
    both = [
        contrastive_subspace(*moments, RANK, generator(), epsilon=1e-2)
        for moments in ((own_there, others_there), (own, others))
    ]
    assert_near(projector(both[0]), projector(both[1]), 1e-6)


@pytest.mark.parametrize("init", STARTS)
def test_starts(gpu, init):
    """A begins on a GPU's machine as it does elsewhere, and the random ones to the last bit."""
    moments = {name: Moment.of(planted(seed)) for seed, name in enumerate("abc")}
    layers, names = {"layer": (RANK, D)}, list("abc")

    def draw(device) -> dict:
        features = {name: {"layer": moments[name].to(device)} for name in names}
        given = {"features": features, "leaders": {"layer": "layer"}, "others": names}
        return starts(StartConfig(init, seed=1), layers, names, **given)

    found, expected = draw(gpu.device), draw("cpu")
    for name in names:
        A = found[name]["layer"]
        assert A.device.type == "cpu" and A.dtype == torch.float32
        if STARTS[init].needs_features:
            assert_near(projector(A), projector(expected[name]["layer"]), 1e-4)
        else:
            assert torch.equal(A, expected[name]["layer"])


def test_transforms(gpu):
    A, own, others = gaussian(RANK, D), Moment.of(planted(0)), Moment.of(planted(5))
    settings = {"kappa": 0.3, "epsilon": 1e-2}
    there = A.to(gpu.device), own.to(gpu.device), others.to(gpu.device)
    assert_near(nullify(*there, **settings), nullify(A, own, others, **settings), 1e-5)
    delta = gaussian(8, D)
    found = LoraPair.project(delta.to(gpu.device), there[0], 2.0)
    assert_near(found.delta, LoraPair.project(delta, A, 2.0).delta, 1e-5)


# ------------------------------------------------------------------ models


def tiny_model(family: str, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS[family])
    config.pad_token_id, config.num_labels = 0, 2
    return AutoModelForSequenceClassification.from_config(config).to(dtype).eval()


def batches(family: str, count: int, size: int = 4) -> list[dict[str, Tensor]]:
    """Random ids of different lengths, padded; T5 wants an end of every example."""
    drawn = []
    for number in range(count):
        ids = torch.randint(4, 20, (size, 7), generator=torch.Generator().manual_seed(number))
        mask = torch.ones_like(ids)
        for row, length in enumerate(range(7, 7 - size, -1)):
            ids[row, length - 1], ids[row, length:], mask[row, length:] = 2, 0, 0
        drawn.append({"input_ids": ids, "attention_mask": mask})
    return drawn


KINDS = [*((family, "token") for family in FAMILIES), ("roberta", "sample"), ("roberta", "mean")]


@pytest.mark.parametrize("family, features", KINDS)
def test_features(gpu, family, features):
    """The same statistics; the CPU does not wait for a layer, and not for a batch."""
    model = tiny_model(family)
    modules = projections(model, "qv", 2)
    expected, leaders = collect(model, modules, batches(family, 10), features)
    model.to(gpu.device)
    found = {}

    def run(count: int) -> None:
        found["all"] = collect(model, modules, batches(family, count), features)

    assert gpu.per(run, 4, 10) == {}
    totals, same = found["all"]
    assert same == leaders and totals.keys() == expected.keys()
    for name, moment in expected.items():
        assert totals[name].count == moment.count
        assert totals[name].data.device.type == gpu.device.type
        assert_near(totals[name].data, moment.data, 1e-5)


def test_lending(real):
    """A model with an update is W0 + ΔW; afterwards it is as before, bit for bit."""
    model = tiny_model("roberta")
    modules = projections(model, "qv", 2)
    update = {name: 0.1 * gaussian(*linear_weight(model, name).shape) for name in modules}
    (batch,) = batches("roberta", 1)
    with torch.no_grad(), applied(model, update):
        expected = model(**batch).logits
    before = {name: host(tensor).clone() for name, tensor in model.state_dict().items()}
    model.to(real)
    batch = {name: tensor.to(real) for name, tensor in batch.items()}
    memory: dict[str, Tensor] = {}
    for _ in range(2):
        with torch.no_grad(), applied(model, update, memory):
            assert_near(model(**batch).logits, expected, 1e-5)
        after = model.state_dict()
        assert all(torch.equal(host(after[name]), before[name]) for name in before)


def test_evaluation(gpu, tiny_data, monkeypatch):
    """The same logits; they are copied once, after the last batch."""
    model, tokenizer = tiny_model("roberta"), make_tokenizer("roberta")
    data = tokenize(load_task(TASKS["rte"], str(tiny_data))["train"], TASKS["rte"], tokenizer, 32)
    expected, labels = predict(model, data, tokenizer, 8, title="")
    model.to(gpu.device)
    if gpu.device == GPU:  # autocast, which is off here, does not know it
        monkeypatch.setattr(torch, "autocast", lambda *_, **__: ExitStack())
    found = {}

    def run(batch_count: int) -> None:
        size = -(-len(labels) // batch_count)
        found["all"] = predict(model, data, tokenizer, size, title="")

    assert gpu.per(run, 2, 12) == {}
    np.testing.assert_allclose(found["all"][0], expected, rtol=1e-4, atol=1e-5)
    assert (found["all"][1] == labels).all()


def test_fisher_information(gpu):
    model = tiny_model("roberta")
    modules = projections(model, "qv", 2)

    def one_by_one(count: int) -> list[dict[str, Tensor]]:
        return [{**batch, "labels": torch.tensor([1])} for batch in batches("roberta", count, 1)]

    expected = fisher_information(model, modules, one_by_one(6))
    model.to(gpu.device)
    found = {}

    def run(count: int) -> None:
        found["all"] = fisher_information(model, modules, one_by_one(count))

    assert gpu.per(run, 2, 6) == {}
    for name in modules:
        assert_near(found["all"][name], expected[name], 1e-4)


# ------------------------------------------------------------------ merging

TASK_NAMES = ("a", "b", "c")


def vectors(out: int = 24, dense: bool = False) -> TaskVectors:
    """Three tasks' updates of two layers of different shapes, as factors or dense."""
    tasks = {}
    for seed, task in enumerate(TASK_NAMES):
        pairs = {
            name: LoraPair(gaussian(3, d, seed=seed), gaussian(rows, 3, seed=seed + 9), 0.5)
            for name, (rows, d) in {"first": (out, 20), "second": (16, 20)}.items()
        }
        tasks[task] = {name: pair.delta if dense else pair for name, pair in pairs.items()}
    return TaskVectors.stack(tasks)


def statistics(updates: TaskVectors, needs: str, device) -> dict | None:
    seeds = range(len(TASK_NAMES))
    if needs == "moments":
        moments = [Moment.of(gaussian(40, 20, seed=seed)).to(device) for seed in seeds]
        return dict.fromkeys(updates, moments)
    squares = {name: updates[name].square() + 1e-3 for name in updates}
    return {name: square.to(device) for name, square in squares.items()} if needs else None


@pytest.mark.parametrize("dense", [False, True], ids=["factors", "dense"])
@pytest.mark.parametrize("method", METHODS)
def test_merging_methods(gpu, method, dense):
    updates, needs = vectors(dense=dense), METHODS[method].needs
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        given = statistics(updates, needs, gpu.device)
        found = merge(method, updates, given, dtype, device=gpu.device)
        expected = merge(method, updates, statistics(updates, needs, "cpu"), dtype)
        for name in updates:
            assert found[name].device.type == gpu.device.type
            assert_near(found[name], expected[name], tolerance)


PER_BLOCK = {"ties.py": {"nonzero", "index.Tensor"}, "dare.py": {"_to_copy"}}
"""TIES finds magnitudes, and reads how many there are; DARE's draws are the CPU's."""


@pytest.mark.parametrize("method", METHODS)
def test_merging_waits_for_a_module_and_not_for_a_block(gpu, method, monkeypatch):
    monkeypatch.setattr(_updates, "_BLOCK_ON_GPU", 1)  # few rows
    needs = METHODS[method].needs

    def run(out: int) -> None:
        updates = vectors(out)
        given = statistics(updates, needs, gpu.device)
        gpu.waits.clear()
        merged = merge(method, updates, given, device=gpu.device)
        for name in updates:
            part = merged.parts[name]
            assert isinstance(part, Masked | LoraPair) or part.device.type == gpu.device.type

    for wait in gpu.per(run, 64, 512):
        file, _, what = wait.removeprefix("merging/").split(": ")
        assert what in PER_BLOCK.get(file, ()), wait


def test_diagnosis(gpu):
    updates = {
        task: dict(zip(stack.updates, column))
        for stack in [vectors()]
        for task, column in zip(TASK_NAMES, zip(*stack.updates.values()))
    }
    weights = {"first": gaussian(24, 20), "second": gaussian(16, 20)}

    def measure(device) -> dict:
        moments = {
            task: dict.fromkeys(weights, Moment.of(gaussian(40, 20, seed=seed)).to(device))
            for seed, task in enumerate(TASK_NAMES)
        }
        return diagnose(
            updates,
            moments,
            lambda name: weights[name].to(device),
            starts={task: dict.fromkeys(weights, gaussian(3, 20)) for task in updates},
            merged={"one": dict.fromkeys(updates, weights)},
        ).record()

    found, expected = numbers(measure(gpu.device)), numbers(measure("cpu"))
    assert len(found) > 100
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)


def numbers(value) -> list[float]:
    """All numbers of a record; None is NaN."""
    if isinstance(value, dict):
        return [number for item in value.values() for number in numbers(item)]
    if isinstance(value, list | tuple):
        return [number for item in value for number in numbers(item)]
    return [] if isinstance(value, str) else [float("nan") if value is None else value]


# ------------------------------------------------------------------ training


def step(family: str, device: str, dtype: torch.dtype, checkpoint: bool) -> tuple[Tensor, Tensor]:
    """The loss, and all gradients of LoRA, of one step as train_glue.py takes it."""
    base = tiny_model(family, dtype)
    torch.manual_seed(1)
    model = add_lora(base, projections(base, "qv", 2), 2, 4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)  # else A has no gradient
        if any(kind in name for kind in ("lora_", "modules_to_save")):
            assert parameter.dtype == torch.float32
        elif "original_module" not in name:
            assert parameter.dtype == dtype
    model.to(device).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if checkpoint:
        enable_checkpointing(model)
    (batch,) = batches(family, 1)
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    labels = torch.tensor([0, 1, 1, 0], device=device)
    with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = torch.nn.functional.cross_entropy(model(**batch).logits.float(), labels)
    loss.backward()
    trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert all(gradient is not None for gradient in trained.values())
    return loss, torch.cat([host(g).flatten() for n, g in trained.items() if "lora_" in n])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_with_and_without_checkpointing(real, family, dtype):
    # bfloat16 has 8 bits: on a CPU, too, a gradient in it differs by 6 % from one in float32.
    tolerance = 1e-4 if dtype == torch.float32 else 0.15
    expected = step(family, "cpu", torch.float32, False)
    for checkpoint in (False, True):
        for found, wanted in zip(step(family, real, dtype, checkpoint), expected):
            assert_near(found, wanted, tolerance)


def test_training_looks_at_the_device_once_in_some_steps(tiny, tiny_data, tmp_path):
    """Each look waits until the device has done all that it was given."""
    waits: list[str] = []
    with Calls(waits, everywhere=True):
        train(small(tiny, tiny_data, tmp_path, tasks=["rte"], per_device_train_bsz=2, epochs=2))
    steps = 27  # of an epoch: 54 examples
    looks = {step for step in range(1, 2 * steps + 1) if step % LOOK == 0 or step % steps == 0}
    assert Counter(waits)["training.py: on_step_end: tolist"] == len(looks)
    assert {wait for wait in waits if wait.startswith("training.py")} == {
        "training.py: on_step_end: tolist"
    }


def test_the_optimizer_is_fused_and_a_gpu_is_not_waited_for(
    real, tiny, tiny_data, tmp_path, monkeypatch
):
    seen = {}

    def on_train_begin(self, *_, optimizer, **__):
        seen["fused"] = all(group["fused"] for group in self.optimizer.param_groups)
        seen["copies"] = self.accelerator.non_blocking, self.args.dataloader_pin_memory

    monkeypatch.setattr(TaskTrainer, "on_train_begin", on_train_begin)
    train(small(tiny, tiny_data, tmp_path, tasks=["rte"], epochs=1))
    assert seen == {"fused": True, "copies": (real == "cuda", real == "cuda")}


def test_a_run_resumes_to_the_same_loss(real, tiny, tiny_data, tmp_path, monkeypatch):
    """And A begins as on a machine without a GPU."""
    options = {"tasks": ["rte"], "init": "contrastive", "epochs": 2}
    config = small(tiny, tiny_data, tmp_path / "whole", **options)
    train(config)
    step = TaskTrainer.training_step

    def interrupted(self, *args):
        if self.state.global_step == 5:
            self.signals.append(signal.SIGTERM)
        return step(self, *args)

    stopped = small(tiny, tiny_data, tmp_path / "stopped", **options)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(TaskTrainer, "training_step", interrupted)
        train(stopped)
    train(replace(stopped, resume=True))
    losses = []
    for run in (config, stopped):
        state = json.loads((run_dir(run, "rte") / "trainer_state.json").read_text())
        losses.append(
            [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry]
        )
    assert len(losses[0]) == 2
    assert losses[1] == pytest.approx(losses[0], rel=0.05 if real == "cuda" else 0)

    flags = f"--backbone {tiny['roberta']} --data-dir {tiny_data} --output-dir {tmp_path / 'cpu'}"
    flags += " --tasks rte --init contrastive --rank 2 --alpha 4 --epochs 1 --dtype float32"
    cpu = Forked(tmp_path / "log", "train_glue.py", *flags.split(), CUDA_VISIBLE_DEVICES="")
    assert cpu.wait()[0] == 0, cpu.wait()[1]
    (elsewhere,) = (tmp_path / "cpu").glob("*/*/init_model")
    here = read_adapter(run_dir(config, "rte") / "init_model").updates
    # On a GPU the statistics are those of a model in bfloat16.
    tolerance = 0.3 if real == "cuda" else 1e-6
    for name, pair in read_adapter(elsewhere).updates.items():
        assert_near(projector(here[name].A), projector(pair.A), tolerance)


def test_a_merge_is_exported_and_scored(real, tiny, tiny_data, tmp_path):
    """merge.py --device: the same files and scores as on the CPU."""
    paths = {
        task: make_adapter(tiny["roberta"], tmp_path / task, 1 if task == "stsb" else 2, seed)
        for seed, task in enumerate(("rte", "stsb"))
    }
    options = {
        "methods": ["task_arithmetic", "regmean"],
        "data_dir": str(tiny_data),
        "export": ["adapter", "model"],
        "diagnose": True,
    }
    cpu = merge_them(paths, tmp_path, "cpu", device="cpu", **options)
    found = merge_them(paths, tmp_path, "found", device=real, **options)
    files = [path.relative_to(cpu) for path in cpu.rglob("*.safetensors")]
    assert len(files) > 8
    for file in files:
        expected, tensors = load_file(cpu / file), load_file(found / file)
        assert tensors.keys() == expected.keys()
        for name in expected:
            assert_near(tensors[name], expected[name], 1e-3)
    scores = [json.loads((out / "results.json").read_text())["rows"] for out in (cpu, found)]
    for here, there in zip(*scores, strict=True):
        assert there["scores"] == pytest.approx(here["scores"], abs=0.05)
