"""--shift-penalty: what it is, and what it does to a training."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification

from osrm.adapters import read_adapter
from osrm.bank import read_bank
from osrm.commands.train import train
from osrm.config import TrainConfig
from osrm.errors import UserError
from osrm.interference import squared_shift
from osrm.moments import Moment, own_and_others
from osrm.penalty import ShiftPenalty
from osrm.runs import run_dir
from tests.conftest import small


@pytest.fixture
def adapted(tiny):
    """A PeftModel whose A and B are random, and {task: {module: feature vectors}}."""
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(tiny["roberta"])
    options = {"r": 3, "lora_alpha": 6, "target_modules": ["query", "value"]}
    model = get_peft_model(base, LoraConfig(init_lora_weights=False, **options))
    layers = {
        name: layer
        for name, layer in model.get_base_model().named_modules()
        if hasattr(layer, "lora_A")
    }
    vectors = {
        task: {
            # The query and the value of a block read one input.
            name: torch.randn(
                count, layer.in_features, generator=torch.Generator().manual_seed(seed)
            )
            for name, layer in layers.items()
        }
        for seed, (task, count) in enumerate({"mine": 70, "first": 5, "second": 90}.items())
    }
    return model, layers, vectors


def penalty(adapted, weight: float = 1.0) -> ShiftPenalty:
    model, layers, vectors = adapted
    moments = {
        task: {name: Moment.of(x) for name, x in by_module.items()}
        for task, by_module in vectors.items()
    }
    leaders = {name: name.replace("value", "query") for name in layers}
    return ShiftPenalty(weight, model, moments, leaders, task="mine", others=[*vectors])


def relative_shift(layers, vectors) -> torch.Tensor:
    """Σ_l E‖ΔW_l h‖² / E‖W_l h‖², from the vectors themselves."""
    total = torch.zeros((), dtype=torch.float64)
    for name, layer in layers.items():
        h = vectors[name].double()
        A, B = (getattr(layer, f"lora_{x}")["default"].weight.double() for x in "AB")
        delta = 2 * B @ A  # lora_alpha / r = 2
        total += (h @ delta.T).square().sum() / (
            h @ layer.base_layer.weight.double().T
        ).square().sum()
    return total


def test_it_is_the_ratio_of_the_shifts_of_the_vectors(adapted):
    _, layers, vectors = adapted
    others = {name: torch.cat([vectors["first"][name], vectors["second"][name]]) for name in layers}
    own = relative_shift(layers, vectors["mine"]) + 1e-4 * len(layers)
    expected = 0.7 * relative_shift(layers, others) / own
    assert penalty(adapted, 0.7)().item() == pytest.approx(float(expected), rel=1e-5)


def test_it_does_not_ask_for_a_small_update(adapted):
    of, layers = penalty(adapted), adapted[1]
    before = float(of())
    with torch.no_grad():
        for layer in layers.values():
            layer.lora_B["default"].weight *= 10
    assert float(of()) == pytest.approx(before, rel=0.01)


def test_its_gradient_is_that_of_finite_differences(adapted):
    of, layers = penalty(adapted), adapted[1]
    B = next(iter(layers.values())).lora_B["default"].weight
    of().backward()
    direction = torch.randn(B.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        values = []
        for step in (1e-2, -2e-2):
            B += step * direction
            values.append(float(of()))
    assert float((B.grad * direction).sum()) == pytest.approx(
        (values[0] - values[1]) / 2e-2, rel=0.02
    )


def test_a_first_step_has_a_gradient(adapted):
    """B = 0 at the start: the penalty is 0 there, and not 0 / 0."""
    of, layers = penalty(adapted), adapted[1]
    with torch.no_grad():
        for layer in layers.values():
            layer.lora_B["default"].weight.zero_()
    value = of()
    value.backward()
    assert float(value) == 0
    assert all(layer.lora_B["default"].weight.grad.isfinite().all() for layer in layers.values())


def others_over_own(config: TrainConfig) -> float:
    """Of the trained adapter of rte: E‖ΔW h‖² of the other tasks' h over that of its own."""
    bank = read_bank(Path(config.feature_bank))
    shifts = torch.zeros(2)
    for name, update in read_adapter(run_dir(config, "rte")).updates.items():
        moments = {task: file[name] for task, file in bank.items()}
        ((_, *sides),) = own_and_others(moments, ["rte"], [*bank])
        shifts += torch.tensor([squared_shift(update, moment) for moment in sides])
    return float(shifts[1] / shifts[0])


@pytest.mark.parametrize("init", ["gaussian", "contrastive"])
def test_a_training_with_it_shifts_the_other_tasks_less(tiny, tiny_data, tmp_path, init):
    config = small(tiny, tiny_data, tmp_path, tasks=["rte"], init=init)
    config = replace(config, feature_bank=str(tmp_path / "bank"), only_features=True)
    train(config)
    config = replace(config, only_features=False)
    train(config)
    penalised = replace(config, shift_penalty=3.0)
    train(penalised)
    assert run_dir(penalised, "rte") != run_dir(config, "rte")
    start, same = (read_adapter(run_dir(c, "rte") / "init_model") for c in (config, penalised))
    for name, update in start.updates.items():
        assert torch.equal(update.A, same.updates[name].A), "the start does not depend on it"
    assert others_over_own(penalised) < 0.96 * others_over_own(config)


def test_what_cannot_have_it(tiny, tiny_data, tmp_path, monkeypatch):
    config = small(tiny, tiny_data, tmp_path, shift_penalty=0.1)
    with pytest.raises(UserError, match=r"--shift-penalty.*--load-model-path"):
        replace(config, load_model_path="runs.json")
    with pytest.raises(UserError, match="--other-tasks"):
        train(replace(config, tasks=["rte"], other_tasks=["rte"]))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match=r"--shift-penalty.*FSDP"):
        train(config)
