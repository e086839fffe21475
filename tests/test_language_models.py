"""Adapters of any model that PEFT trains: merged, exported, and loaded by PEFT and transformers.

The models are tiny and random, and have no tokenizer. The oracle is PEFT's own merge_and_unload.
"""

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from peft import AutoPeftModel, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    RobertaConfig,
    T5Config,
    ViTConfig,
)

from osrm.checkpoints import load_adapters
from osrm.errors import UserError
from osrm.merged import load_merged
from tests.conftest import merge_them

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 40}
MODELS = {
    "llama": (LlamaConfig(**GROUPED), "CAUSAL_LM"),
    "qwen2": (Qwen2Config(**GROUPED), "CAUSAL_LM"),
    "gemma": (GemmaConfig(**GROUPED), "CAUSAL_LM"),
    "mistral": (MistralConfig(**GROUPED), "CAUSAL_LM"),
    "gpt2": (
        GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=16),
        "CAUSAL_LM",
    ),
    "t5": (T5Config(**T5, decoder_start_token_id=0, pad_token_id=0), "SEQ_2_SEQ_LM"),
    "roberta": (RobertaConfig(**SIZES, max_position_embeddings=34), "SEQ_CLS"),
    "vit": (
        ViTConfig(image_size=8, patch_size=4, **{k: v for k, v in SIZES.items() if "_id" not in k}),
        None,
    ),
}
CLASSES = {
    "CAUSAL_LM": "ForCausalLM",
    "SEQ_2_SEQ_LM": "ForSeq2SeqLM",
    "SEQ_CLS": "ForSequenceClassification",
    None: "ForImageClassification",
}
# Of one of the two adapters of a family.
OPTIONS = {
    "qwen2": {
        "use_rslora": True,
        "layers_to_transform": [1],
        "target_modules": ["q_proj", "o_proj", "down_proj"],
        "r": 3,
    },
    "llama": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1": 7}},
    "vit": {"modules_to_save": ["classifier"]},
}
HEADS = {"vit": ["classifier"], "roberta": ["classifier"]}


def auto(family: str):
    return getattr(transformers, f"AutoModel{CLASSES[MODELS[family][1]]}")


def inputs(family: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    if family == "vit":
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator)}
    ids = torch.randint(3, 40, (2, 6), generator=generator)
    return {"input_ids": ids, **({"decoder_input_ids": ids} if family == "t5" else {})}


@torch.no_grad()
def logits(family: str, model) -> torch.Tensor:
    return model.eval()(**inputs(family)).logits


def make_base(family: str, folder: Path) -> str:
    torch.manual_seed(0)
    model = auto(family).from_config(copy.deepcopy(MODELS[family][0]))
    model.save_pretrained(folder)
    return str(folder)


def make_adapter(family: str, base: str, folder: Path, seed: int, **options) -> str:
    """By PEFT alone, on all linear layers, with random factors and saved modules."""
    torch.manual_seed(seed)
    config = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **options}
    config.setdefault("modules_to_save", HEADS.get(family))
    model = get_peft_model(
        auto(family).from_pretrained(base), LoraConfig(task_type=MODELS[family][1], **config)
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.1)
    model.save_pretrained(folder)
    return str(folder)


def unloaded(family: str, base: str, adapter: str):
    """The whole model of one adapter, by PEFT."""
    model = PeftModel.from_pretrained(auto(family).from_pretrained(base), adapter)
    return model.merge_and_unload()


def summed(family: str, base: str, adapters: dict[str, str], own: str):
    """W0 + Σ (W_t - W0) of all, and the saved modules of one task."""
    model = unloaded(family, base, adapters[own])
    start = auto(family).from_pretrained(base).state_dict()
    saved = json.loads((Path(adapters[own]) / "adapter_config.json").read_text())["modules_to_save"]
    state = model.state_dict()
    for task, path in adapters.items():
        if task == own:
            continue
        for name, tensor in unloaded(family, base, path).state_dict().items():
            if not any(f"{module}." in name for module in saved or []) and "bias" not in name:
                state[name] += tensor - start[name]
    model.load_state_dict(state)
    return model


def load_both(family: str, base: str, out: Path, task: str) -> list:
    """The exported adapter by PEFT's Auto class, and the exported model by transformers'."""
    task_type = MODELS[family][1]
    name = CLASSES[task_type].removeprefix("For") if task_type else ""
    loader = getattr(peft, f"AutoPeftModelFor{name}") if task_type else AutoPeftModel
    return [
        loader.from_pretrained(out / "adapters" / task),
        auto(family).from_pretrained(out / "models" / task),
    ]


FAMILIES = [
    # The layers of Gemma and Mistral have Llama's names.
    pytest.param(name, marks=[pytest.mark.sweep] * (name in ("gemma", "mistral")))
    for name in MODELS
]


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture
def adapters(family, tmp_path) -> tuple[str, dict[str, str]]:
    base = make_base(family, tmp_path / "base")
    options = OPTIONS.get(family, {})
    return base, {
        "first": make_adapter(family, base, tmp_path / "first", 1),
        "second": make_adapter(family, base, tmp_path / "second", 2, **options),
    }


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


SUM = {"methods": ["task_arithmetic"], "scale": 1.0, "no_eval": True}
"""Options of a merge that adds the updates up."""
BOTH = ["adapter", "model"]


def assert_sum_of_what_peft_merges(family: str, base: str, paths: dict[str, str], folder: Path):
    """Of the exports, and of what load_merged returns; the directory of the merge."""
    out = merge_them(paths, folder, export=BOTH, **SUM) / "task_arithmetic"
    for task in paths:
        expected = logits(family, summed(family, base, paths, task))
        for model in (*load_both(family, base, out, task), load_merged(out, task)):
            assert_close(logits(family, model), expected)
    return out


def test_a_merge_is_the_sum_of_what_peft_merges(family, adapters, tmp_path):
    assert_sum_of_what_peft_merges(family, *adapters, tmp_path)


def test_one_adapter_of_weight_1_is_itself(family, adapters, tmp_path):
    base, paths = adapters
    methods = ["average", "tsv", "task_arithmetic"]
    options = {**SUM, "methods": methods, "export": BOTH}
    out = merge_them({"second": paths["second"]}, tmp_path, **options)
    expected = logits(family, unloaded(family, base, paths["second"]))
    for method in methods:
        for model in load_both(family, base, out / method, "second"):
            assert_close(logits(family, model), expected)


@pytest.mark.parametrize(
    "family",
    ["llama", *(pytest.param(name, marks=pytest.mark.sweep) for name in MODELS if name != "llama")],
    indirect=True,
)
def test_all_methods_are_exported(family, adapters, tmp_path):
    base, paths = adapters
    with pytest.raises(UserError, match=r"--export adapter: .*ties"):  # after all else is there
        merge_them(paths, tmp_path, no_eval=True, export=BOTH)
    for out in sorted(path for path in (tmp_path / "out").iterdir() if path.is_dir()):
        dense = auto(family).from_pretrained(out / "models/first")
        expected = logits(family, load_merged(out, "first"))
        assert_close(logits(family, dense), expected)
        if (out / "adapters").exists():
            loaded = load_both(family, base, out, "first")[0]
            assert_close(logits(family, loaded), expected)
            config = json.loads((out / "adapters/first/adapter_config.json").read_text())
            assert config["task_type"] == MODELS[family][1]


@pytest.mark.parametrize("family", FAMILIES[:-1], indirect=True)
def test_whole_models_are_merged_as_what_they_are(family, adapters, tmp_path):
    """But for ViT, whose files have other names than its tensors."""
    base, paths = adapters
    dense = {}
    for task, path in paths.items():
        dense[task] = str(tmp_path / f"dense-{task}")
        unloaded(family, base, path).save_pretrained(dense[task])
    out = merge_them(dense, tmp_path, backbone=base, export=["model"], **SUM)
    loaded = auto(family).from_pretrained(out / "task_arithmetic/models/first")
    expected = logits(family, summed(family, base, paths, "first"))
    assert_close(logits(family, loaded), expected)


def test_a_saved_module_inside_the_body_keeps_its_name(tmp_path):
    base = make_base("llama", tmp_path / "base")
    paths = {
        task: make_adapter("llama", base, tmp_path / task, seed, modules_to_save=["embed_tokens"])
        for seed, task in enumerate(("first", "second"))
    }
    out = assert_sum_of_what_peft_merges("llama", base, paths, tmp_path)
    for task in paths:
        config = json.loads((out / "adapters" / task / "adapter_config.json").read_text())
        assert config["modules_to_save"] == ["embed_tokens"]
        assert config["task_type"] == "CAUSAL_LM"


def test_two_names_of_one_base_need_backbone_to_say_so(tmp_path):
    base = make_base("llama", tmp_path / "base")
    paths = {task: make_adapter("llama", base, tmp_path / task, 1) for task in ("one", "other")}
    (tmp_path / "link").symlink_to(base)
    file = tmp_path / "other" / "adapter_config.json"
    other = {"base_model_name_or_path": str(tmp_path / "link")}
    file.write_text(json.dumps(json.loads(file.read_text()) | other))
    with pytest.raises(UserError, match="two names of one model, give --backbone"):
        merge_them(paths, tmp_path, methods=["average"], no_eval=True)
    out = merge_them(paths, tmp_path, methods=["average"], no_eval=True, backbone=base)
    assert (out / "average" / "recipe.json").exists()


def test_new_classes_of_a_head(tmp_path):
    """Three classes on a body that has no head, and no task type."""
    family, base = "vit", str(tmp_path / "base")
    torch.manual_seed(0)
    transformers.ViTModel(MODELS["vit"][0], add_pooling_layer=False).save_pretrained(base)
    paths, models = {}, {}
    for seed, task in enumerate(("cats", "dogs")):
        config = LoraConfig(r=4, target_modules="all-linear", modules_to_save=["classifier"])
        start = transformers.ViTForImageClassification.from_pretrained(base, num_labels=3)
        models[task] = get_peft_model(start, config)
        torch.manual_seed(seed)
        for parameter in models[task].parameters():
            if parameter.requires_grad:
                parameter.data.normal_(std=0.1)
        paths[task] = str(tmp_path / task)
        models[task].save_pretrained(paths[task])
    one = merge_them({"cats": paths["cats"]}, tmp_path, "one", export=["model"], **SUM)
    expected = logits(family, models["cats"])
    assert expected.shape[1] == 3
    loaded = auto(family).from_pretrained(one / "task_arithmetic/models/cats")
    assert_close(logits(family, loaded), expected)
    both = merge_them(paths, tmp_path, "both", export=["model"], **SUM)
    heads = [load_merged(both / "task_arithmetic", task).classifier.weight for task in paths]
    assert not torch.equal(*heads)


def test_a_sequence_classifier_without_a_task_type_is_scored(tiny, tiny_data, tmp_path):
    torch.manual_seed(0)
    start = transformers.AutoModelForSequenceClassification.from_pretrained(tiny["roberta"])
    options = {"target_modules": ["query"], "modules_to_save": ["classifier"]}
    get_peft_model(start, LoraConfig(**options)).save_pretrained(tmp_path / "rte")
    config = json.loads((tmp_path / "rte" / "adapter_config.json").read_text())
    assert config["task_type"] is None and config["auto_mapping"]
    out = merge_them(
        {"rte": tmp_path / "rte"}, tmp_path, methods=["average"], data_dir=str(tiny_data)
    )
    assert (out / "results.json").exists()


def test_adapters_of_different_task_types_are_refused(tmp_path):
    base = make_base("llama", tmp_path / "base")
    paths = {task: make_adapter("llama", base, tmp_path / task, 1) for task in ("one", "other")}
    file = tmp_path / "other" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"task_type": "SEQ_2_SEQ_LM"}))
    with pytest.raises(UserError, match=r"'one' and 'other' .*CAUSAL_LM.*SEQ_2_SEQ_LM"):
        merge_them(paths, tmp_path, no_eval=True)


def test_glue_does_not_score_language_models(tmp_path):
    base = make_base("llama", tmp_path / "base")
    paths = {"rte": make_adapter("llama", base, tmp_path / "rte", 1)}
    with pytest.raises(UserError, match=r"CAUSAL_LM.*--no-eval"):
        merge_them(paths, tmp_path)


@pytest.fixture
def head_adapters(tmp_path) -> tuple[str, dict[str, str]]:
    """LoRA on lm_head, too: PEFT saves the layer of the base beside it."""
    base, paths = make_base("llama", tmp_path / "base"), {}
    targets = ["q_proj", "lm_head"]
    for seed, task in enumerate(("first", "second")):
        folder = tmp_path / task
        paths[task] = make_adapter("llama", base, folder, seed, target_modules=targets)
        state = load_file(folder / "adapter_model.safetensors")
        assert "base_model.model.lm_head.base_layer.weight" in state
    return base, paths


def test_lora_on_the_layer_that_writes_tokens(head_adapters, tmp_path):
    assert_sum_of_what_peft_merges("llama", *head_adapters, tmp_path)


def test_another_layer_than_the_base_has_is_refused(head_adapters, tmp_path):
    _, paths = head_adapters
    file = Path(paths["second"]) / "adapter_model.safetensors"
    state = load_file(file)
    state["base_model.model.lm_head.base_layer.weight"][3, 5] += 1e-3
    save_file(state, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"second: its lm_head.weight is not that of the base"):
        merge_them(paths, tmp_path, methods=["average"], no_eval=True)
    with pytest.raises(UserError, match=r"second: it holds lm_head.weight of its base model"):
        load_adapters({"second": paths["second"]})


def test_a_base_layer_in_half_precision_is_compared_so(head_adapters, tmp_path):
    _, paths = head_adapters
    for path in paths.values():
        file = Path(path) / "adapter_model.safetensors"
        state = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
        save_file(state, file, {"format": "pt"})
    assert merge_them(paths, tmp_path, methods=["average"], no_eval=True).exists()


def test_a_head_that_is_the_embedding_gets_adapters_only(tmp_path):
    torch.manual_seed(0)
    config = copy.deepcopy(MODELS["llama"][0])
    config.tie_word_embeddings = True
    base = str(tmp_path / "base")
    auto("llama").from_config(config).save_pretrained(base)
    paths = {"one": make_adapter("llama", base, tmp_path / "one", 1, target_modules=["lm_head"])}
    options = {"methods": ["average"], "no_eval": True}
    with pytest.raises(UserError, match=r"lm_head shares its weight .*--export adapter"):
        merge_them(paths, tmp_path, "whole", export=["model"], **options)
    out = merge_them(paths, tmp_path, "adapters", export=["adapter"], **options)
    adapted = peft.AutoPeftModelForCausalLM.from_pretrained(paths["one"])
    exported = peft.AutoPeftModelForCausalLM.from_pretrained(out / "average/adapters/one")
    assert_close(logits("llama", exported), logits("llama", adapted))
    with pytest.raises(UserError, match="lm_head shares its weight"):
        load_merged(out / "average", "one")
