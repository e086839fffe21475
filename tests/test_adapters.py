"""Adapters: PEFT's own functions are the oracle for every name, shape and scaling."""

import json
import re
import sys
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification

from osrm.adapters import (
    CONFIG,
    Adapter,
    add_lora,
    read_adapter,
    save_adapter,
    write_adapter,
    write_factors,
    write_head,
)
from osrm.backbones import (
    Backbone,
    Kind,
    head_names,
    load_model,
    load_tokenizer,
    projections,
)
from osrm.checkpoints import Checkpoint, check_fits
from osrm.errors import UserError
from osrm.lending import applied, load_head
from osrm.task_vectors import LoraPair, dense

FAMILIES = ["roberta", "bert", "mpnet", "distilbert", "t5", "llama"]
HEADS = {
    "roberta": ["classifier"],
    "bert": ["classifier"],
    "mpnet": ["classifier"],
    "distilbert": ["pre_classifier", "classifier"],
    "t5": ["classification_head"],
    "llama": ["score"],
}
IDS = torch.tensor([[1, 5, 9, 8, 2], [1, 7, 2, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


def load(directory):
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(directory, num_labels=3).eval()
    model.config.pad_token_id = 0
    return model


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=MASK).logits


def randomise(model, seed=1):
    """Random A, B and head: an adapter as after a training."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("family", FAMILIES)
def test_projections_and_heads_are_found_from_the_models_own_names(tiny, family):
    model = load(tiny[family])
    assert head_names(model) == HEADS[family]
    found = {block: projections(model, block, 2) for block in ("q", "k", "v", "qkv")}
    attentions = 6 if family == "t5" else 2  # T5: encoder, decoder and cross attention
    assert [len(found[block]) for block in found] == [attentions] * 3 + [3 * attentions]
    assert not any(name.startswith(tuple(HEADS[family])) for name in found["qkv"])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_adapter_gives_the_same_logits_through_peft_and_through_our_own_path(
    tiny, family, tmp_path
):
    base = load(tiny[family])
    model = add_lora(base, projections(base, "qv", 2), rank=2, alpha=6)
    randomise(model)
    expected = logits(model.eval())
    save_adapter(model, tmp_path)

    through_peft = PeftModel.from_pretrained(load(tiny[family]), tmp_path).eval()
    torch.testing.assert_close(logits(through_peft), expected)

    adapter = read_adapter(tmp_path)
    pairs, ours = adapter.updates, load(tiny[family])
    load_head(ours, adapter.head)
    untouched = logits(ours)
    with applied(ours, {module: pair.delta for module, pair in pairs.items()}):
        torch.testing.assert_close(logits(ours), expected, rtol=1e-5, atol=1e-5)
    assert adapter.base == str(tiny[family]) and adapter.kind == Kind("SEQ_CLS")
    assert torch.equal(logits(ours), untouched)
    assert (untouched - expected).abs().max() > 1e-3  # the update does something


@pytest.mark.parametrize("family", FAMILIES)
def test_at_the_start_the_outputs_are_the_base_models_exactly(tiny, family):
    base = load(tiny[family])
    before = logits(base)
    modules = projections(base, "qkv", 2)
    model = add_lora(base, modules, rank=2, alpha=6)
    start = {name: torch.eye(2, 32) for name in modules}
    write_factors(model, start)
    assert torch.equal(logits(model.eval()), before)
    for name in modules:
        weight = model.get_base_model().get_submodule(name).lora_A["default"].weight
        assert torch.equal(weight, start[name])


def test_factors_for_other_layers_are_refused(tiny):
    base = load(tiny["roberta"])
    modules = projections(base, "qv", 2)
    model = add_lora(base, modules, rank=2, alpha=6)
    with pytest.raises(ValueError, match=re.escape(f"LoRA on {sorted(modules)}")):
        write_factors(model, {modules[0]: torch.eye(2, 32)})


@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "lora_alpha": 7},
        {"r": 4, "lora_alpha": 7, "use_rslora": True},
        {"r": 4, "lora_alpha": 7, "alpha_pattern": {"layer.0.attention.self.query": 3}},
        {"r": 4, "lora_alpha": 7, "rank_pattern": {"value": 2}},
        {"r": 4, "lora_alpha": 7, "rank_pattern": {"value": 2}, "use_rslora": True},
    ],
    ids=str,
)
def test_the_update_is_the_one_that_peft_merges(tiny, tmp_path, options):
    base = load(tiny["roberta"])
    weights = {name: module.weight.clone() for name, module in _linear(base)}
    model = get_peft_model(base, LoraConfig(target_modules=["query", "value"], **options))
    randomise(model)
    model.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path)
    pairs, head = adapter.updates, adapter.head
    merged = dict(_linear(model.merge_and_unload()))
    assert head == {} and len(pairs) == 4
    for name, pair in pairs.items():
        torch.testing.assert_close(pair.delta, merged[name].weight - weights[name])


@pytest.mark.filterwarnings("ignore:Adapter .* invalid shape")  # PEFT expects no vector in lora_B
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lora_bias": True},
        {"lora_bias": True, "use_rslora": True},
        {"lora_bias": True, "rank_pattern": {"value": 2}, "alpha_pattern": {"0.*query": 3}},
    ],
    ids=str,
)
def test_under_the_update_the_base_gives_the_outputs_of_the_peft_model(
    tiny, tmp_path, options, dtype
):
    config = LoraConfig(r=4, lora_alpha=7, target_modules=["query", "value"], **options)
    model = get_peft_model(load(tiny["roberta"]), config).eval()
    randomise(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.to(dtype)
    model.save_pretrained(tmp_path)
    for parameter in trained:
        parameter.data = parameter.data.float()
    expected = logits(model)

    updates = read_adapter(tmp_path).updates
    biases = {name: update for name, update in updates.items() if name.endswith(".bias")}
    assert len(updates) == (8 if "lora_bias" in options else 4) == 4 + len(biases)
    assert all(b.shape == (32, 1) and b.dtype == torch.float32 for b in biases.values())
    ours = load(tiny["roberta"])
    before = {key: tensor.clone() for key, tensor in ours.state_dict().items()}
    with applied(ours, {name: dense(update) for name, update in updates.items()}):
        torch.testing.assert_close(logits(ours), expected, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(tensor, before[key]) for key, tensor in ours.state_dict().items())
    head = {key: tensor for key, tensor in before.items() if key.startswith("classifier")}
    check_fits(Checkpoint(updates, head, path=tmp_path), ours)


def test_a_bias_is_added_only_where_there_is_one_of_its_size(tiny, tmp_path):
    roberta, llama = load(tiny["roberta"]), load(tiny["llama"])
    query = projections(roberta, "q", 2)[0]
    name = projections(llama, "q", 2)[0]
    for model, update in (
        (llama, {f"{name}.bias": torch.ones(32, 1)}),
        (roberta, {f"{query}.bias": torch.ones(3, 1)}),
        (roberta, {"roberta.embeddings.LayerNorm.bias": torch.ones(32, 1)}),
    ):
        layer = next(iter(update)).removesuffix(".bias")
        with pytest.raises(ValueError, match=layer), applied(model, update):
            pass
        with pytest.raises(UserError, match=layer):
            check_fits(Checkpoint(update, {}, path=tmp_path), model)


def _linear(model):
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]


SUPPORTED = (
    "r lora_alpha rank_pattern alpha_pattern use_rslora lora_bias modules_to_save task_type"
    " auto_mapping"
)
HARMLESS = (
    "base_model_name_or_path peft_version revision inference_mode"
    " target_modules exclude_modules layers_to_transform layers_pattern lora_dropout megatron_core"
    " qalora_group_size eva_config corda_config lora_ga_config loftq_config fan_in_fan_out"
)


@pytest.mark.parametrize("start", [True, "gaussian", "eva", "orthogonal"])
def test_a_plain_adapter_is_read_without_peft(tiny, tmp_path, monkeypatch, start):
    model = add_lora(load(tiny["roberta"]), ["query"], rank=2, alpha=6)
    model.peft_config["default"].init_lora_weights = start
    save_adapter(model, tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)
    assert len(read_adapter(tmp_path).updates) == 2


@pytest.mark.parametrize("name", sorted(LoraConfig().to_dict().keys() - {*SUPPORTED.split()}))
def test_every_option_that_may_change_the_update_is_refused_by_name(tiny, tmp_path, name):
    """All of this PEFT's, also those that it will get."""
    model = add_lora(load(tiny["roberta"]), ["query"], rank=2, alpha=6)
    save_adapter(model, tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: "pissa"}))
    if name in HARMLESS.split():
        read_adapter(tmp_path)
    else:
        with pytest.raises(UserError, match=f"{name}='pissa': only plain LoRA"):
            read_adapter(tmp_path)


def test_a_freed_weight_comes_back_after_an_error(tiny):
    model = load(tiny["roberta"])
    name = projections(model, "q", 2)[0]
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="stop"), applied(model, {name: torch.ones(32, 32)}):
        assert not torch.equal(model.state_dict()[name + ".weight"], before[name + ".weight"])
        raise RuntimeError("stop")
    with (
        pytest.raises(ValueError, match="no linear layer"),
        applied(model, {name: torch.ones(32, 32), "no.such.layer": torch.ones(32, 32)}),
    ):
        pass
    with pytest.raises(ValueError, match="update"), applied(model, {name: torch.ones(3, 3)}):
        pass
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_updates_lent_in_turn_share_memory_and_leave_nothing_behind(tiny, dtype):
    """W0 + ΔW is added in float32 and rounded once, whatever lay in the memory."""
    model = load(tiny["roberta"]).to(dtype)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    weight, bias = projections(model, "q", 2)[0], projections(model, "q", 2)[0] + ".bias"
    memory, places = {}, set()
    for seed in range(3):
        torch.manual_seed(seed)
        update = {weight: torch.randn(32, 32), bias: torch.randn(32, 1)}
        with applied(model, update, memory):
            state = model.state_dict()
            lent, lent_bias = state[weight + ".weight"], state[bias]
            wanted = (before[weight + ".weight"].float() + update[weight]).to(dtype)
            wanted_bias = (before[bias].float() + update[bias][:, 0]).to(dtype)
            assert torch.equal(lent, wanted) and torch.equal(lent_bias, wanted_bias)
            places.add((lent.data_ptr(), lent_bias.data_ptr()))
        assert all(torch.equal(each, before[key]) for key, each in model.state_dict().items())
    assert len(places) == 1 and set(memory) == {weight, bias}


def test_freezing_and_precision(tiny):
    """What is trained is float32 on bfloat16 weights; --freeze A or B holds that factor alone."""
    for freeze, held in (("N", ()), ("A", ("lora_A",)), ("B", ("lora_B",))):
        base = load(tiny["roberta"]).bfloat16()
        model = add_lora(base, projections(base, "qv", 2), 2, 4, freeze=freeze)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        kinds = {kind for kind in ("lora_A", "lora_B", "classifier") for n in trained if kind in n}
        assert kinds == {"lora_A", "lora_B", "classifier"} - set(held)
        assert all(p.dtype == torch.float32 for p in trained.values())
        assert base.roberta.embeddings.word_embeddings.weight.dtype == torch.bfloat16


def test_heads_must_fit(tiny, tmp_path):
    base = load(tiny["roberta"])
    model = add_lora(base, projections(base, "qv", 2), 2, 4)
    randomise(model)
    save_adapter(model, tmp_path)
    head = read_adapter(tmp_path).head
    fresh = load(tiny["roberta"])
    other = add_lora(fresh, projections(fresh, "qv", 2), 2, 4)
    write_head(other, head)
    saved = tmp_path / "again"
    save_adapter(other, saved)
    assert all(torch.equal(tensor, head[name]) for name, tensor in read_adapter(saved).head.items())
    with pytest.raises(ValueError, match="the model wants"):
        load_head(load(tiny["roberta"]), {})
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["modules_to_save"].count("classifier") >= 1


@pytest.mark.parametrize("biased", [False, True])
def test_what_is_written_is_read_back(biased, tmp_path):
    """Of different ranks and scalings; a layer without an update of its bias has a zero one."""
    torch.manual_seed(0)
    updates = {
        "layer.1.query": LoraPair(torch.randn(3, 8), torch.randn(5, 3), 2.0),
        "layer.11.query": LoraPair(torch.randn(2, 8), torch.randn(5, 2), 0.5),
        "layer.1.value": LoraPair(torch.randn(1, 8), torch.randn(4, 1), 1.0),
    }
    expected = {name: pair.delta for name, pair in updates.items()}
    if biased:
        updates["layer.1.query.bias"] = torch.randn(5, 1)
        zeros = {f"{name}.bias": torch.zeros(len(delta), 1) for name, delta in expected.items()}
        expected |= zeros | {"layer.1.query.bias": updates["layer.1.query.bias"]}
    head = {"classifier.weight": torch.randn(2, 4), "pooler.dense.bias": torch.randn(3)}
    kind = Kind(None, "ViTForImageClassification", "transformers.models.vit.modeling_vit")
    adapter = Adapter(updates, head, ("classifier", "pooler.dense"), "some/base", kind)
    write_adapter(tmp_path / "adapter", adapter)
    found = read_adapter(tmp_path / "adapter")
    assert replace(found, updates={}, head={}) == replace(adapter, updates={}, head={})
    assert found.head.keys() == head.keys()
    assert all(torch.equal(found.head[name], head[name]) for name in head)
    assert found.updates.keys() == expected.keys()
    for name, delta in expected.items():
        torch.testing.assert_close(dense(found.updates[name]), delta)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_of_the_base_makes_no_difference(tiny, family, classes, dtype, tmp_path):
    """Neither to the weights, nor to the new head, nor to what is drawn next."""
    whole = AutoModelForSequenceClassification.from_pretrained(tiny[family], num_labels=classes)
    whole.to(dtype).save_pretrained(tmp_path / "head")
    whole.base_model.save_pretrained(tmp_path / "body")
    tokenizer = load_tokenizer(Backbone("", str(tiny[family])))
    states = []
    for name in ("body", "head"):
        torch.manual_seed(7)
        backbone = Backbone(name, str(tmp_path / name))
        model = load_model(backbone, ("no", "yes"), tokenizer, "auto")
        assert model.name_or_path == model.config.name_or_path == backbone.path
        states.append(model.state_dict() | {"drawn": torch.rand(1)})
        meta = load_model(backbone, ("no", "yes"), tokenizer, "auto", device="meta")
        assert [t.shape for t in meta.state_dict().values()] == [
            t.shape for t in model.state_dict().values()
        ]
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert states[1][name].dtype == tensor.dtype and torch.equal(states[1][name], tensor), name


def test_the_order_of_the_layers_in_the_file_does_not_depend_on_the_process(tiny, tmp_path):
    """PEFT keeps their names in a set, whose order Python draws for each process."""
    base = load(tiny["roberta"])
    save_adapter(add_lora(base, projections(base, "qkv", 2), 2, 4), tmp_path / "saved")
    pairs = {f"layer.{i}": LoraPair(torch.ones(1, 3), torch.ones(2, 1), 1.0) for i in range(9)}
    write_adapter(tmp_path / "written", Adapter(pairs, {}))
    for folder in ("saved", "written"):
        config = json.loads((tmp_path / folder / CONFIG).read_text())
        assert config["target_modules"] == sorted(config["target_modules"])
