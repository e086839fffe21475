"""The plug-in: OSRM's start on any PeftModel, lent and given back, from batches or bank files."""

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    ViTConfig,
)

import osrm
from osrm import embedded
from osrm.backbones import body_fingerprint
from osrm.bank import FeatureFile
from osrm.commands.plan import make_plan, open_session, prepare_start
from osrm.config import TrainConfig
from osrm.errors import UserError
from osrm.plugin import (
    collect_osrm_features,
    get_osrm_state_dict,
    initialize_lora_osrm_weights,
)
from osrm.subspace import random_frame
from tests.conftest import BERT_LIKE, COMMON, CONFIGS

RANK = 3
TARGETS = {
    "roberta": ["query", "value"],
    "llama": ["q_proj", "v_proj"],
    "gpt2": ["c_attn"],
    "t5": ["q", "v"],
    "vit": ["q_proj", "v_proj", "query", "value"],  # by the version of transformers
}
HEADS = {
    "llama": AutoModelForCausalLM,
    "gpt2": AutoModelForCausalLM,
    "t5": AutoModelForSeq2SeqLM,
    "vit": AutoModelForImageClassification,
}
FIRST_WORD = {"mine": 4, "theirs": 24, "more": 44}  # the tasks share none of the 64 words
PADDING = {"labels": -100}


def base_model(family="roberta"):
    """A tiny random model, the same at each call, with the head that the family is used with."""
    torch.manual_seed(0)
    if family == "gpt2":
        config = GPT2Config(**COMMON, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    elif family == "vit":
        sizes = {name: size for name, size in BERT_LIKE.items() if "position" not in name}
        config = ViTConfig(**sizes, image_size=16, patch_size=4)
    else:
        config = copy.deepcopy(CONFIGS[family])
    # Many words and large weights: the inputs of every layer span the space.
    config.vocab_size, config.initializer_range = 64, 0.3
    return HEADS.get(family, AutoModelForSequenceClassification).from_config(config).eval()


def peft_model(family="roberta", base=None, **options):
    options = {"r": RANK, "target_modules": TARGETS[family], **options}
    config = LoraConfig(**options, fan_in_fan_out=family == "gpt2")
    return get_peft_model(base or base_model(family), config)


def examples(family, task, count=12):
    generator = torch.Generator().manual_seed(FIRST_WORD[task])

    def words(length):
        return torch.randint(20, (length,), generator=generator) + FIRST_WORD[task]

    for length in (5, 8, 3, 6) * (count // 4):
        if family == "vit":
            yield {"pixel_values": torch.randn(3, 16, 16, generator=generator)}
            continue
        text = {"input_ids": words(length), "attention_mask": torch.ones(length).long()}
        if family == "t5":  # as long as the longest input of each batch
            yield {**text, "labels": words(8)}
        elif family == "t5 with decoder masks":
            mask = torch.ones(11 - length).long()
            yield {**text, "decoder_input_ids": words(len(mask)), "decoder_attention_mask": mask}
        elif family in ("llama", "gpt2"):
            yield {**text, "labels": text["input_ids"]}
        else:  # a class of another task, which this head does not have
            yield {**text, "labels": torch.tensor([7])}


def batches(family, task, size=4, **options):
    def collate(part):
        return {
            name: pad_sequence([each[name] for each in part], True, PADDING.get(name, 0))
            for name in part[0]
        }

    return DataLoader(list(examples(family, task, **options)), batch_size=size, collate_fn=collate)


def sources(family="roberta", tasks=("mine", "theirs", "more"), **options):
    return {task: batches(family, task, **options) for task in tasks}


def layers(model, adapter="default"):
    """{module: (A, B)}"""
    return {
        name: (module.lora_A[adapter].weight.data, module.lora_B[adapter].weight.data)
        for name, module in model.get_base_model().named_modules()
        if hasattr(module, "lora_A") and adapter in module.lora_A
    }


def moments(base, modules, family, tasks):
    """{module: E[h hᵀ]} by numpy in float64, one example at a time: no padding, no mask."""
    entered = {name: [] for name in modules}
    handles = [
        base.get_submodule(name).register_forward_hook(
            lambda _, args, __, name=name: entered[name].append(args[0].flatten(0, -2).numpy())
        )
        for name in modules
    ]
    with torch.no_grad():
        for task in tasks:
            for example in examples(family, task):
                if "roberta" in family:
                    del example["labels"]
                base(**{name: value[None] for name, value in example.items()})
    for handle in handles:
        handle.remove()
    rows = {name: np.concatenate(parts).astype(np.float64) for name, parts in entered.items()}
    return {name: each.T @ each / len(each) for name, each in rows.items()}


def least(moment, rank):
    return np.linalg.eigvalsh(moment)[:rank].sum()


def energy(A, moment):
    A = A.double().numpy()
    return np.trace(A @ moment @ A.T)


def logits(model, family):
    batch = dict(next(iter(batches(family, "mine"))))
    if "roberta" in family:
        del batch["labels"]
    with torch.no_grad():
        return model(**batch).logits


@pytest.mark.parametrize("family", [*TARGETS, "t5 with decoder masks"])
def test_a_is_the_least_energy_of_the_others_and_the_outputs_stay(family):
    kind = family.split()[0]
    base, model = base_model(kind), peft_model(kind).eval()
    expected = logits(base, family)
    initialize_lora_osrm_weights(model, sources(family), task="mine")
    assert torch.equal(logits(model, family), expected)
    found = layers(model)
    others = moments(base, found, family, ["theirs", "more"])
    for name, (A, B) in found.items():
        torch.testing.assert_close(A @ A.T, torch.eye(RANK), rtol=0, atol=1e-5)
        spread = np.trace(others[name]) / 32
        assert energy(A, others[name]) <= least(others[name], RANK) * 1.001 + 1e-7 * spread
        assert energy(A, others[name]) < 0.2 * RANK * spread
        assert not B.any()


def test_own_features_do_not_matter_to_osrm_and_may_be_missing():
    model = peft_model()
    start = get_osrm_state_dict(model, sources(), task="mine")
    without = get_osrm_state_dict(model, sources(tasks=["theirs", "more"]), task="mine")
    assert all(torch.equal(start[name], without[name]) for name in layers(model))
    other = get_osrm_state_dict(model, sources(), task="theirs")
    assert not any(torch.allclose(start[name], other[name], atol=0.1) for name in start)


def test_contrastive_has_more_of_the_own_and_needs_it():
    base, model = base_model(), peft_model()
    others = sources(tasks=["theirs", "more"])
    with pytest.raises(UserError, match="'mine', the own task"):
        get_osrm_state_dict(model, others, task="mine", method="contrastive")
    own = moments(base, layers(model), "roberta", ["mine"])
    energies = []
    for method, epsilon in (("analytical", 1.0), ("contrastive", 0.1), ("contrastive", 10.0)):
        start = get_osrm_state_dict(model, sources(), task="mine", method=method, epsilon=epsilon)
        energies.append(sum(energy(A, own[name]) for name, A in start.items()))
    assert 4 * energies[0] < 2 * energies[1] < energies[2]


@pytest.mark.parametrize("method", ["gaussian", "kaiming", "orthogonal"])
def test_random_starts_need_no_data(method):
    model = peft_model()
    initialize_lora_osrm_weights(model, task="mine", method=method, norm=2.0)
    found = [A.clone() for A, _ in layers(model).values()]
    assert all(torch.allclose(A.norm(dim=1), torch.full((RANK,), 2.0)) for A in found)
    assert not torch.equal(found[0], found[1])
    initialize_lora_osrm_weights(model, task="mine", method=method, norm=2.0, seed=1)
    assert not any(torch.equal(A, old) for (A, _), old in zip(layers(model).values(), found))


def test_ranks_are_the_adapters_and_readers_of_one_input_share_a():
    pattern = {"layer.0.attention.self.value": 5}
    model = peft_model(
        target_modules=["query", "key", "value", "output.dense"], rank_pattern=pattern
    )
    initialize_lora_osrm_weights(model, sources(), task="mine")
    found = {name.removeprefix("roberta.encoder."): A for name, (A, _) in layers(model).items()}
    others = moments(base_model(), layers(model), "roberta", ["theirs", "more"])
    first, second = (f"layer.{i}.attention.self." for i in (0, 1))
    assert torch.equal(found[first + "query"], found[first + "key"])
    assert torch.equal(found[second + "query"], found[second + "value"])
    assert found[first + "value"].shape == (5, 32) and found[first + "query"].shape == (3, 32)
    assert found["layer.0.output.dense"].shape == (3, 64)
    for name, A in found.items():
        moment = others["roberta.encoder." + name]
        assert energy(A, moment) <= least(moment, len(A)) * 1.001 + 1e-7 * np.trace(moment)


def test_another_adapter_is_off_meanwhile_and_stays_as_it_was():
    fresh = get_osrm_state_dict(peft_model(), sources(), task="mine")
    model = peft_model()
    for A, B in layers(model).values():
        A.normal_(), B.normal_()
    with pytest.raises(UserError, match=r"query: B of adapter 'default' is not zero"):
        initialize_lora_osrm_weights(model, sources(), task="mine")
    model.add_adapter("second", LoraConfig(r=RANK, target_modules=TARGETS["roberta"]))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    initialize_lora_osrm_weights(model, sources(), task="mine", adapter_name="second")
    assert all(torch.equal(A, fresh[name]) for name, (A, _) in layers(model, "second").items())
    assert model.active_adapter == "default"
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (".lora_A.second." not in name)


def test_a_keeps_its_own_precision():
    model = peft_model(base=base_model().bfloat16()).bfloat16()
    weight = next(iter(layers(model).values()))[0]
    initialize_lora_osrm_weights(model, sources(), task="mine")
    assert weight.dtype == torch.bfloat16
    torch.testing.assert_close(weight.float() @ weight.float().T, torch.eye(3), rtol=0, atol=0.02)


def seen(model):
    """All that a caller may notice of a model that was lent."""
    return {
        "modes": [module.training for module in model.modules()],
        "trained": {name: each.requires_grad for name, each in model.named_parameters()},
        "hooks": [len(module._forward_pre_hooks) for module in model.modules()],
        "adapters": (model.active_adapters, model.get_model_status().enabled),
    }


def test_the_model_comes_back_as_it_was_even_after_an_error():
    model = peft_model(modules_to_save=["classifier"]).train()
    layer = model.get_base_model().roberta.encoder.layer[0]
    layer.attention.eval()  # part of it alone
    layer.attention.self.query.lora_A["default"].requires_grad_(False)  # as --freeze A
    calls = []
    layer.attention.self.query.register_forward_pre_hook(lambda *_: calls.append(1))
    before = seen(model)

    def broken():
        yield from batches("roberta", "theirs")
        raise RuntimeError("the disk is gone")

    with pytest.raises(RuntimeError, match="the disk"):
        get_osrm_state_dict(model, {"theirs": broken()}, task="mine")
    assert seen(model) == before and len(calls) == 3
    get_osrm_state_dict(model, sources(), task="mine")
    assert seen(model) == before and len(calls) == 9


@pytest.mark.parametrize("features", ["token", "sample", "mean"])
def test_a_bank_gives_the_same_start_as_the_batches(tmp_path, features):
    model = peft_model()
    fresh = get_osrm_state_dict(model, sources(), task="mine", features=features)
    path = tmp_path / "theirs.safetensors"
    theirs = batches("roberta", "theirs")
    file = collect_osrm_features(peft_model(r=7), theirs, path, features=features)
    assert file.settings["task"] == "theirs"
    for source in (path, str(path), file):
        both = {"theirs": source, "more": batches("roberta", "more")}
        cached = get_osrm_state_dict(model, both, task="mine", features=features)
        assert all(torch.equal(cached[name], fresh[name]) for name in layers(model))


def test_a_bank_serves_adapters_of_some_of_its_layers(tmp_path):
    """Also where the first reader of a layer's input is not among them, and from both sides."""
    wide, narrow = peft_model(), peft_model(target_modules=["value"])
    path = tmp_path / "theirs.safetensors"
    collect_osrm_features(wide, batches("roberta", "theirs"), path)
    both = {"theirs": path, "more": batches("roberta", "more")}
    for some in (both, dict(reversed(both.items()))):
        cached = get_osrm_state_dict(narrow, some, task="mine")
        fresh = get_osrm_state_dict(narrow, sources(), task="mine")
        assert set(cached) == set(layers(narrow))
        assert all(torch.equal(cached[name], fresh[name]) for name in fresh)
    file = collect_osrm_features(narrow, batches("roberta", "theirs"), path)
    with pytest.raises(UserError, match=r"lacks 2 layers \(.*query"):
        get_osrm_state_dict(wide, {"theirs": file}, task="mine")


def test_banks_of_other_models_or_settings_and_damaged_ones_are_refused(tmp_path):
    def refused(reason, model, features="token"):
        def never():
            raise AssertionError("looked at batches before the files")
            yield

        mixed = {"more": never(), "theirs": path}
        with pytest.raises(UserError, match=rf"theirs.safetensors: .*{reason}"):
            initialize_lora_osrm_weights(model, mixed, task="mine", features=features)

    path = tmp_path / "theirs.safetensors"
    refused("no file of feature statistics", peft_model())
    collect_osrm_features(peft_model(), batches("roberta", "theirs"), path)
    refused("features is 'token' there, 'mean' here", peft_model(), "mean")
    other = base_model()
    other.roberta.encoder.layer[1].output.dense.weight.data += 1
    refused("body_fingerprint", peft_model(base=other))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    refused("checksum", peft_model())
    path.write_bytes(whole[: len(whole) // 2])
    refused("no file of feature statistics", peft_model())


def fingerprint(model, tmp_path, family="roberta"):
    path = tmp_path / "theirs.safetensors"
    return collect_osrm_features(model, batches(family, "theirs"), path).settings[
        "body_fingerprint"
    ]


def test_the_fingerprint_is_the_bodys_alone(tmp_path):
    """Adapters, training, heads, and trained copies of the body's modules do not change it."""
    expected = body_fingerprint(base_model())
    model = peft_model(modules_to_save=["classifier", "word_embeddings"])
    assert fingerprint(model, tmp_path) == expected
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data.normal_()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["key"], use_dora=True))
    assert fingerprint(model, tmp_path) == expected
    base = base_model()
    base.classifier = nn.Identity()
    assert fingerprint(peft_model(base=base), tmp_path) == expected


class Plain(nn.Module):
    """No transformers model: its body is all but the modules that are saved with the adapter."""

    def __init__(self, classes):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.idle, self.twice, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, classes)

    def forward(self, x):
        return self.head(self.twice(self.twice(self.body(x))))


def plain_model(classes=2, **options):
    options = {"r": 2, "target_modules": ["body.0"], "modules_to_save": ["head"], **options}
    return get_peft_model(Plain(classes), LoraConfig(**options))


TENSORS = [torch.randn(20, 8, generator=torch.Generator().manual_seed(0))]


def test_any_module_and_batches_of_one_tensor(tmp_path):
    wide = plain_model(target_modules=["body.0", "body.2"])
    file = collect_osrm_features(wide, TENSORS, tmp_path / "theirs")
    model = plain_model(classes=5)
    initialize_lora_osrm_weights(model, {"theirs": file}, task="mine")
    moment = (TENSORS[0].T @ TENSORS[0]).double().numpy() / 20
    assert energy(layers(model)["body.0"][0], moment) == pytest.approx(least(moment, 2), rel=1e-3)


@pytest.mark.parametrize(
    ("reason", "lora", "options"),
    [
        (r"1 layers never ran \(idle\)", {"target_modules": ["body.0", "idle"]}, {}),
        ("twice runs more than once", {"target_modules": ["twice"]}, {}),
        ("body.0: rank 9 is above its 8 input", {"r": 9}, {}),
        ("body.0: rank 10 is above", {"rank_pattern": {"body.0": 10}}, {}),
        ("adapter_name 'x': no LoRA", {}, {"adapter_name": "x"}),
        ("task: not given", {}, {"task": None}),
        ("method 'best'", {}, {"method": "best"}),
        ("features 'all'", {}, {"features": "all"}),
        ("epsilon 0", {}, {"epsilon": 0}),
        ("norm -1", {}, {"norm": -1}),
        ("no task but 'mine'", {}, {"sources": {"mine": TENSORS}}),
        ("'theirs': there was no batch", {}, {"sources": {"theirs": iter(())}}),
        ("'theirs': a batch is a list", {}, {"sources": {"theirs": [TENSORS]}}),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(reason, lora, options):
    options = {"sources": {"theirs": TENSORS}, "task": "mine", **options}
    with pytest.raises(UserError, match=reason) as error:
        initialize_lora_osrm_weights(plain_model(**lora), **options)
    assert "\n" not in str(error.value)


def test_models_without_lora_are_refused():
    with pytest.raises(UserError, match="a Plain; wrap it with get_peft_model"):
        initialize_lora_osrm_weights(Plain(2), {"theirs": TENSORS}, task="mine")
    other = IA3Config(target_modules=["body.0"], feedforward_modules=[])
    with pytest.raises(UserError, match="no LoRA adapter"):
        initialize_lora_osrm_weights(get_peft_model(Plain(2), other), task="mine")


def test_layers_that_are_not_linear_are_refused_by_name():
    model = peft_model(target_modules=["query", "word_embeddings"])
    with pytest.raises(UserError, match=r"word_embeddings: LoRA on this Embedding"):
        initialize_lora_osrm_weights(model, sources(), task="mine")
    model = peft_model("vit", target_modules=["q_proj", "projection"])
    with pytest.raises(UserError, match=r"projection: LoRA on this Conv2d"):
        initialize_lora_osrm_weights(model, sources("vit"), task="mine")
    model = plain_model(target_modules=[], target_parameters=["body.0.weight"])
    with pytest.raises(UserError, match=r"body.0: LoRA on this Linear"):
        initialize_lora_osrm_weights(model, {"theirs": TENSORS}, task="mine")
    attention = nn.ModuleDict({"heads": nn.MultiheadAttention(8, 2)})
    model = get_peft_model(attention, LoraConfig(r=2, target_modules=["heads"]))
    with pytest.raises(UserError, match=r"heads: LoRA on this MultiheadAttention"):
        initialize_lora_osrm_weights(model, {"theirs": TENSORS}, task="mine")
    model = plain_model()  # QALoRA's A reads sums over groups of inputs
    model.get_base_model().body[0].lora_A["default"] = nn.Linear(4, 2, bias=False)
    with pytest.raises(UserError, match=r"body.0: LoRA on this Linear"):
        initialize_lora_osrm_weights(model, {"theirs": TENSORS}, task="mine")


def test_a_merged_adapter_is_refused_since_it_cannot_be_lent_unchanged():
    model = peft_model()
    model.merge_adapter()
    with pytest.raises(UserError, match="query: an adapter is merged"):
        initialize_lora_osrm_weights(model, sources(), task="mine")


def test_a_state_dict_can_be_kept_and_must_fit():
    model, start = peft_model(), get_osrm_state_dict(peft_model(), sources(), task="mine")
    initialize_lora_osrm_weights(model, osrm_state_dict=start)
    assert all(torch.equal(A, start[name]) for name, (A, _) in layers(model).items())
    short = dict(list(start.items())[1:])
    for odd, refused in ((peft_model(r=2), start), (model, short), (model, {**short, "x": A0})):
        with pytest.raises(UserError, match=r"osrm_state_dict: .*(query|x): A is"):
            initialize_lora_osrm_weights(odd, osrm_state_dict=refused)


A0 = torch.eye(RANK, 32)


def test_dora_starts_with_the_same_outputs():
    base, model = base_model(), peft_model(use_dora=True).eval()
    initialize_lora_osrm_weights(model, sources(), task="mine")
    torch.testing.assert_close(logits(model, "roberta"), logits(base, "roberta"))
    assert torch.equal(
        next(iter(layers(model).values()))[0],
        next(iter(get_osrm_state_dict(peft_model(), sources(), task="mine").values())),
    )


class Coarse(nn.Linear):
    """Stands in for a quantised layer: what it multiplies with is not its weight."""

    def forward(self, x):
        return nn.functional.linear(x, (self.weight * 64).round() / 64, self.bias)


def quantised(layer, bits):
    if bits == "stand-in":
        coarse = Coarse(layer.in_features, layer.out_features)
        coarse.load_state_dict(layer.state_dict())
        return coarse
    bnb = pytest.importorskip("bitsandbytes")
    coarse = (
        bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, has_fp16_weights=False)
        if bits == "8"
        else bnb.nn.Linear4bit(layer.in_features, layer.out_features, quant_type="nf4")
    )
    coarse.load_state_dict(layer.state_dict(), strict=False)
    return coarse.to("cpu")  # now it quantises


@pytest.mark.parametrize("bits", ["stand-in", "8", "4"])
def test_quantised_layers(bits):
    base = base_model()
    base.is_loaded_in_8bit, base.is_loaded_in_4bit = bits == "8", bits == "4"
    wide = [f"roberta.encoder.layer.{i}.output.dense" for i in (0, 1)]  # 64 inputs: one block
    for name in wide:
        base.set_submodule(name, quantised(base.get_submodule(name), bits))
    model = peft_model(base=base, target_modules=wide).eval()
    expected = logits(model, "roberta")
    initialize_lora_osrm_weights(model, sources(), task="mine")
    assert torch.equal(logits(model, "roberta"), expected)
    exact = get_osrm_state_dict(peft_model(target_modules=wide), sources(), task="mine")
    for name, (A, _) in layers(model).items():
        kind = type(model.get_base_model().get_submodule(name).get_base_layer()).__name__
        assert kind == {"stand-in": "Coarse", "8": "Linear8bitLt", "4": "Linear4bit"}[bits]
        torch.testing.assert_close(A @ A.T, torch.eye(RANK), rtol=0, atol=1e-5)
        # Nothing quantised comes before the first one's input.
        assert torch.allclose(A, exact[name], atol=1e-5) == (name == wide[0])


PROCESS = """
import sys
import torch
import torch.distributed as dist
from torch import nn
from osrm.features import collect

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
    def forward(self, x, attention_mask):
        return self.a(x) + self.b(x.tanh())

def collected(features, task, rank=0, world=1):
    generator = torch.Generator().manual_seed(len(task))
    batches = []
    for length in (2, 5, 3, 4, 7):
        x = torch.randn(2, length, 16, generator=generator)
        batches.append({"x": x, "attention_mask": torch.arange(length) < torch.tensor([[2], [9]])})
    mine = batches[rank::world]
    if task == "one process has none":
        mine = batches if rank == 0 else []
    totals, leaders = collect(Net(), ["a", "b"], mine, features)
    return {name: (totals[leaders[name]].count, totals[leaders[name]].data) for name in "ab"}

def results(*place):
    return {
        (features, task): collected(features, task, *place)
        for features in ("token", "sample", "mean")
        for task in ("shared", "one process has none")
    }
"""
START = """
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
torch.save(results(rank, 2), f"{folder}/{rank}")
dist.destroy_process_group()
"""


def test_two_processes_find_together_what_one_finds_alone(tmp_path):
    """The features are where processes meet; each imports no more than it must, to be quick."""
    command = [sys.executable, "-c", PROCESS + START]
    processes = [subprocess.Popen([*command, str(rank), str(tmp_path)]) for rank in (0, 1)]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    first, second = (torch.load(tmp_path / str(rank)) for rank in (0, 1))
    namespace = {}
    exec(PROCESS, namespace)
    for key, alone in namespace["results"]().items():
        for name, (count, data) in alone.items():
            assert first[key][name][0] == second[key][name][0] == count
            found, again = first[key][name][1], second[key][name][1]
            assert torch.equal(found, again) and found.dtype == data.dtype
            torch.testing.assert_close(found.T @ found, data.T @ data, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", ["roberta", "llama", "t5"])
def test_banks_go_to_train_glue_and_back(tiny, tiny_data, tmp_path, family):
    """train_glue.py's bank and seed give its start here, and it takes a bank from here."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"

    def train(bank):
        flags = {"data_dir": str(tiny_data), "feature_bank": str(bank), "rank": RANK}
        plan = make_plan(TrainConfig(str(tiny[family]), ["rte"], init="analytical", **flags))
        return prepare_start(plan, open_session(plan), plan.tasks)

    def adapted():
        base = AutoModelForSequenceClassification.from_pretrained(tiny[family], num_labels=5)
        base.config.pad_token_id = 0
        return peft_model(family, base, task_type="SEQ_CLS")

    start = train(theirs).A["rte"]
    banks = {path.stem: FeatureFile(path) for path in theirs.iterdir()}
    assert set(banks) == {"rte", "sst2", "stsb"}
    model = adapted()
    initialize_lora_osrm_weights(model, banks, task="rte")
    for name, (A, _) in layers(model).items():
        others = banks["sst2"][name] + banks["stsb"][name]
        least_energy = pytest.approx(others.energy(start[name]), rel=1e-4, abs=1e-6)
        assert others.energy(A) == least_energy
    batch = {"input_ids": torch.tensor([[1, 5, 9, 8, 2], [1, 6, 7, 4, 2]])}
    collect_osrm_features(model, [batch], ours / "sst2.safetensors")
    changed = train(ours)
    assert (
        changed.features["sst2"].path.parent == ours
        and "seed" not in changed.features["sst2"].settings
    )
    assert not any(torch.equal(changed.A["rte"][name], A) for name, A in start.items())


SENTENCES = {
    "films": """A moving story with a wonderful cast.
        The plot makes no sense and the jokes are old.
        It is the funniest comedy of the year.
        Nobody should have to sit through this mess.
        The camera lingers on faces and lets the silence speak.
        An honest, warm and clever little picture.
        The sequel repeats every mistake of the first one.
        I left the cinema with a smile.""",
    "questions": """What is the capital of Peru?
        How many legs does a spider have?
        Who wrote the first novel in English?
        When did the last ice age end?
        Why is the sky blue?
        Which river flows through Vienna?
        Where are most diamonds mined?
        What does a barometer measure?""",
    "news": """Shares fell four percent after the company cut its forecast.
        The minister said that talks would resume on Monday.
        Two people were hurt when a bridge collapsed in the storm.
        The court upheld the ruling against the bank.
        Oil prices rose to their highest level in three years.
        Voters in the northern province go to the polls today.
        The airline cancelled sixty flights because of the strike.
        Researchers have found water on a distant planet.""",
}


def test_on_a_real_model_the_others_have_little_energy_also_in_new_text(tmp_path):
    path = embedded.minilm()
    tokenizer = AutoTokenizer.from_pretrained(path)
    seen_before, new = {}, {}
    for task, text in SENTENCES.items():
        lines = [line.strip() for line in text.splitlines()]
        for part, kept in ((seen_before, lines[:6]), (new, lines[6:])):
            part[task] = [tokenizer(kept, padding=True, return_tensors="pt")]
    model = AutoModelForSequenceClassification.from_pretrained(path)
    model = get_peft_model(model, LoraConfig(r=8, target_modules=["query", "value"]))
    initialize_lora_osrm_weights(model, seen_before, task="films")
    generator = torch.Generator().manual_seed(0)
    ratios = {}
    for name, part in (("seen", seen_before), ("new", new)):
        others = part["questions"] + part["news"]
        file = collect_osrm_features(model, others, tmp_path / name)
        ratios[name] = [
            file[layer].energy(A) / file[layer].energy(random_frame(384, 8, generator))
            for layer, (A, _) in layers(model).items()
        ]
    assert max(ratios["seen"]) < 1e-6
    assert np.mean(ratios["new"]) < 0.5


def test_the_package_offers_the_plug_in():
    assert osrm.initialize_lora_osrm_weights is initialize_lora_osrm_weights
    assert osrm.get_osrm_state_dict is get_osrm_state_dict
    assert osrm.collect_osrm_features is collect_osrm_features
