"""Merged models on disk, in the formats of others, and repeated from their recipes."""

import json
import logging
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from osrm import export, load_merged
from osrm.adapters import read_adapter
from osrm.commands.merge import run
from osrm.config import MergeConfig
from osrm.errors import UserError
from osrm.export import export_adapters, export_model
from osrm.merged import MergedUpdate, save_merged
from osrm.merging import METHODS, Masked, Merged, row
from osrm.merging._factors import product_svd
from osrm.merging._updates import pack
from osrm.records import Recipe, Source
from osrm.task_vectors import LoraPair
from tests.conftest import make_adapter, merge_them, written

ATTENTION = "roberta.encoder.layer.{}.attention.self.{}"
TASKS = {
    "polite": {"r": 2, "target_modules": ["query", "value"], "lora_alpha": 6},
    "brief": {
        "r": 3,
        "target_modules": ["query", "value", "key"],
        "rank_pattern": {"layer.0.attention.self.query": 1},
        "use_rslora": True,
    },
    "kind": {"r": 1, "target_modules": ["query"]},
}
"""Ranks differ by layer and task; the value and the key are not adapted by all."""
LABELS = {"polite": 2, "brief": 3, "kind": 1}
DENSE = ["ties", "dare_linear", "dare_ties", "emr"]
BLIND = [name for name in METHODS if not METHODS[name].needs]
LOW = [name for name in BLIND if name not in DENSE]


@pytest.fixture(scope="module")
def paths(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return {
        task: make_adapter(tiny["roberta"], folder / task, LABELS[task], seed, **options)
        for seed, (task, options) in enumerate(TASKS.items())
    }


@pytest.fixture(scope="module")
def out(paths, tmp_path_factory):
    """All methods that need no data."""
    return merge_them(paths, tmp_path_factory.mktemp("merged"), no_eval=True)


@torch.no_grad()
def logits(model):
    tokens = torch.randint(4, 20, (5, 9), generator=torch.Generator().manual_seed(0))
    return model.eval()(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits


def through_peft(tiny, adapter, labels):
    base = AutoModelForSequenceClassification.from_pretrained(tiny["roberta"], num_labels=labels)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT's of adapter keys that are lacking
        return logits(PeftModel.from_pretrained(base, adapter))


def save_parts(folder: Path, parts, tasks=("polite", "brief", "kind")) -> Path:
    """A merged model of these parts, without heads."""
    recipe = Recipe(
        **{"method": "average", "knobs": {}, "backbone": "tiny", "base": "tiny"},
        **{"dtype": "float32", "max_num_samples": 1, "count_padding": False},
        tasks=dict.fromkeys(tasks, Source("nowhere", "0")),
    )
    save_merged(folder, Merged(parts, tasks), {task: {} for task in tasks}, recipe)
    return folder


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_every_method_was_merged(out):
    assert sorted(path.name for path in out.iterdir()) == sorted(BLIND)


@pytest.mark.parametrize("method", LOW)
def test_peft_computes_with_the_adapter_what_the_merged_model_does(method, out, tiny, tmp_path):
    tasks = [MergedUpdate(out / method, task) for task in LABELS]
    found = export_adapters(tasks, tmp_path)
    for merged, (task, labels) in zip(tasks, LABELS.items()):
        assert found["error"] < 1e-6 and set(found["errors"]) == set(merged)
        ours = logits(load_merged(out / method, task))
        theirs = through_peft(tiny, tmp_path / task, labels)
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
        pairs = read_adapter(tmp_path / task).updates
        for module, pair in pairs.items():
            # PEFT needs a rank of 1 for a zero update, too.
            assert len(pair.A) == max(1, np.linalg.matrix_rank(merged[module].numpy(), rtol=1e-5))
        assert len({len(pair.A) for pair in pairs.values()}) > 1
        assert not pairs[ATTENTION.format(1, "query")].delta.any()
    plain = AutoModelForSequenceClassification.from_pretrained(tiny["roberta"], num_labels=1)
    assert (logits(plain) - ours).abs().max() > 0.1


@pytest.mark.parametrize("rank", [1, 2, 3, 100])
def test_a_truncated_adapter_is_nearest_of_its_rank(rank, out, tmp_path):
    merged = MergedUpdate(out / "task_arithmetic", "brief")
    found = export_adapters([merged], tmp_path, rank)
    pairs = read_adapter(tmp_path / "brief").updates
    lost = whole = 0.0
    for module in merged:
        dense = merged[module].double().numpy()
        values = np.linalg.svd(dense, compute_uv=False)
        least = np.sqrt(np.sum(values[rank:] ** 2))
        error = np.linalg.norm(pairs[module].delta.double().numpy() - dense)
        assert len(pairs[module].A) <= rank
        assert error == pytest.approx(least, rel=1e-4, abs=1e-5)
        norm = np.linalg.norm(dense)
        assert found["errors"][module] == pytest.approx(
            least / norm if norm else 0, rel=1e-5, abs=1e-6
        )
        lost, whole = lost + least**2, whole + norm**2
    assert found["error"] == pytest.approx((lost / whole) ** 0.5, rel=1e-5, abs=1e-6)
    assert found["rank"] == min(rank, 5)  # of the values of both layers: 2 and 3


def test_factors_of_an_adapter_are_balanced(out, tmp_path):
    export_adapters([MergedUpdate(out / "iso_c", "kind")], tmp_path)
    for pair in read_adapter(tmp_path / "kind").updates.values():
        assert pair.scaling == 1
        torch.testing.assert_close(pair.A @ pair.A.T, pair.B.T @ pair.B, rtol=1e-4, atol=1e-5)


def test_an_update_that_is_zero_everywhere_is_an_adapter_too(tmp_path):
    zero = LoraPair(torch.zeros(0, 7), torch.zeros(5, 0), 1.0)
    merged = MergedUpdate(save_parts(tmp_path / "merged", {"layer": zero}), "kind")
    found = export_adapters([merged], tmp_path, 2)
    assert (found["rank"], found["error"]) == (1, 0)
    delta = read_adapter(tmp_path / "kind").updates["layer"].delta
    assert delta.shape == (5, 7) and not delta.any()


def test_biases_of_adapters_are_exported(tiny, tmp_path):
    """One adapter has them, the other has not."""
    paths = {
        "biased": make_adapter(
            tiny["roberta"], tmp_path / "b", 2, 0, target_modules=["query"], lora_bias=True
        ),
        "plain": make_adapter(tiny["roberta"], tmp_path / "p", 2, 1, target_modules=["value"]),
    }
    out = merge_them(paths, tmp_path, methods=["average"], no_eval=True)
    export_adapters([MergedUpdate(out / "average", "plain")], tmp_path / "adapters")
    theirs = through_peft(tiny, tmp_path / "adapters" / "plain", 2)
    ours = logits(load_merged(out / "average", "plain"))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    assert MergedUpdate(out / "average", "plain")[ATTENTION.format(0, "query") + ".bias"].any()


@pytest.mark.parametrize("method", DENSE)
def test_an_update_of_full_rank_is_no_adapter(method, out, tmp_path):
    with pytest.raises(UserError, match=f"{method} gives no update of low rank") as caught:
        merged = MergedUpdate(shutil.copytree(out / method, tmp_path / method), "kind")
        export_adapters([merged], tmp_path / "adapters")
    assert "\n" not in str(caught.value) and str(tmp_path) not in str(caught.value)
    assert not (tmp_path / "adapters").exists()


def test_adapters_of_all_tasks_take_one_decomposition_a_layer(paths, tmp_path, monkeypatch):
    """And are those that each task has alone."""
    sizes = []

    def counted(B, A):
        sizes.append((len(B), A.shape[1]))
        return product_svd(B, A)

    monkeypatch.setattr("osrm.export.product_svd", counted)
    out = merge_them(paths, tmp_path, methods=["average"], no_eval=True, export=["adapter"])
    assert sizes == [(32, 32)] * 6  # query, key and value of two layers
    for task in TASKS:
        export_adapters([MergedUpdate(out / "average", task)], tmp_path / "alone")
        alone, together = tmp_path / "alone" / task, out / "average" / "adapters" / task
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            assert (alone / name).read_bytes() == (together / name).read_bytes()


@pytest.mark.parametrize("method", ["ties", "emr", "tsv"])
def test_an_exported_model_computes_what_the_merged_model_does(method, out, tmp_path):
    for task, labels in LABELS.items():
        export_model(MergedUpdate(out / method, task), tmp_path / task)
        theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / task)
        assert theirs.config.num_labels == labels
        ours = logits(load_merged(out / method, task))
        torch.testing.assert_close(logits(theirs), ours, rtol=0, atol=1e-6)
        assert (tmp_path / task / "tokenizer.json").exists()


def test_an_exported_model_has_the_precision_of_its_base(out, tmp_path):
    merged = shutil.copytree(out / "ties", tmp_path / "ties")
    recipe = json.loads((merged / "recipe.json").read_text())
    base = AutoModelForSequenceClassification.from_pretrained(recipe["backbone"])
    base.bfloat16().base_model.save_pretrained(tmp_path / "base")
    for file in Path(recipe["backbone"]).glob("tokenizer*"):
        shutil.copy(file, tmp_path / "base")
    (merged / "recipe.json").write_text(json.dumps(recipe | {"backbone": str(tmp_path / "base")}))
    update = MergedUpdate(merged, "kind")
    export_model(update, tmp_path / "model")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", dtype="auto")
    assert model.dtype == torch.bfloat16
    for name in update:
        expected = base.get_submodule(name).weight.float() + update[name]
        assert torch.equal(model.get_submodule(name).weight, expected.bfloat16())


CLASSES = {
    "names of the body": AutoModel,
    "names of old": AutoModel,
    "language model": {"t5": AutoModelForSeq2SeqLM, "llama": AutoModelForCausalLM},
}
STORED = [
    *((f, s) for f in ("roberta", "bert", "t5", "llama") for s in ("one file", "shards")),
    *((f, "names of the body") for f in ("roberta", "bert", "t5", "llama")),
    *((f, "language model") for f in ("t5", "llama")),
    ("bert", "names of old"),
    *((f, "another head") for f in ("roberta", "t5")),
]


def store_base(family: str, stored: str, dtype: torch.dtype, tiny, base: Path) -> None:
    """A copy of the tiny base in one of the forms that bases come in."""
    chosen = CLASSES.get(stored, AutoModelForSequenceClassification)
    body = chosen[family] if isinstance(chosen, dict) else chosen
    labels = {"num_labels": 5} if stored == "another head" else {}
    model = body.from_pretrained(tiny[family], dtype=dtype, **labels)
    model.save_pretrained(base, max_shard_size="20KB" if stored == "shards" else "1GB")
    AutoTokenizer.from_pretrained(tiny[family]).save_pretrained(base)
    if stored == "names of old":
        rename_norms(base / "model.safetensors")


def rename_norms(file: Path) -> None:
    """Give the norms' parameters their old names, as BERT's first checkpoints have them."""
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    tensors = load_file(file)
    for new, name in old.items():
        tensors = {key.replace(new, name): each for key, each in tensors.items()}
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family, stored", STORED)
def test_a_model_is_exported_tensor_by_tensor(family, stored, dtype, tiny, tmp_path, monkeypatch):
    """And is bit for bit the merged model, ties and all, with nothing lacking or left over.

    Of T5 in float16 transformers keeps a part in float32.
    """
    base = tmp_path / "base"
    store_base(family, stored, dtype, tiny, base)
    assert (len([*base.glob("*.safetensors")]) > 1) == (stored == "shards")
    targets = {"t5": ["q", "v"], "llama": ["q_proj", "v_proj"]}.get(family, ["query", "value"])
    head = {"t5": "classification_head", "llama": "score"}.get(family, "classifier")
    adapter = make_adapter(
        base, tmp_path / "a", 2, 0, target_modules=targets, modules_to_save=[head]
    )
    out = merge_them({"brief": adapter}, tmp_path, methods=["average"], no_eval=True)
    expected = load_merged(out / "average", "brief", dtype="auto")

    def whole(*_, **__):
        raise AssertionError("the base was loaded whole")

    monkeypatch.setattr(export, "load_merged", whole)
    monkeypatch.setattr(export, "SHARD", 20_000)
    export_model(MergedUpdate(out / "average", "brief"), tmp_path / "model")
    assert len([*(tmp_path / "model").glob("*.safetensors")]) > 1
    found, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "model", dtype="auto", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert found.dtype == dtype and type(found) is type(expected)
    state = found.state_dict()
    assert state.keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert state[name].dtype == tensor.dtype and torch.equal(state[name], tensor), name
    assert found.config.id2label == expected.config.id2label
    assert AutoTokenizer.from_pretrained(tmp_path / "model").get_vocab()


def test_a_base_without_safetensors_is_loaded_whole_and_that_is_said(tiny, tmp_path, caplog):
    base = shutil.copytree(tiny["roberta"], tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(base)
    (base / "model.safetensors").unlink()
    torch.save(model.state_dict(), base / "pytorch_model.bin")
    adapter = make_adapter(base, tmp_path / "a", 2, 0, target_modules=["query"])
    out = merge_them({"polite": adapter}, tmp_path, methods=["average"], no_eval=True)
    with caplog.at_level(logging.INFO, logger="osrm"):
        export_model(MergedUpdate(out / "average", "polite"), tmp_path / "model")
    assert "loaded at once" in caplog.text
    found = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    assert torch.equal(logits(found), logits(load_merged(out / "average", "polite")))


def test_merge_py_exports_what_has_a_format_and_says_what_has_none(paths, tmp_path):
    options = {"methods": ["ties", "average"], "export": ["adapter", "model"], "rank": 2}
    with pytest.raises(UserError, match="--export adapter: ties gave no update of low rank"):
        merge_them(paths, tmp_path, no_eval=True, **options)
    out = tmp_path / "out"
    for task in TASKS:
        assert (out / "ties" / "models" / task / "model.safetensors").exists()
        pairs = read_adapter(out / "average" / "adapters" / task).updates
        assert max(len(pair.A) for pair in pairs.values()) == 2
    found = json.loads((out / "average" / "adapters" / "truncation.json").read_text())
    assert found["rank"] == 2 and 0 < found["error"] < 1
    assert not (out / "ties" / "adapters").exists()


PARTS = {
    "shared": gaussian(5, 7),
    "of a view": gaussian(7, 5).T,
    "rows": gaussian(3, 5, 7),
    "factors": LoraPair(gaussian(2, 7), gaussian(5, 2), 0.25),
    "no rank": LoraPair(torch.zeros(0, 7), torch.zeros(5, 0), 1.0),
    "double": gaussian(5, 7).double() / 3,
    "double factors": LoraPair(gaussian(2, 7).double() / 3, gaussian(5, 2).double(), 2.0),
    "masked": Masked(gaussian(5, 7), pack(gaussian(3, 5, 7) > 0), gaussian(3)),
    "../../up": gaussian(1, 1),
}


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_parts_on_disk_read_back_equal_and_scaled(scale, tmp_path):
    save_parts(tmp_path / "merged", PARTS)
    before = Merged(PARTS, list(TASKS))
    for number, task in enumerate(TASKS):
        saved = MergedUpdate(tmp_path / "merged", task, scale)
        assert list(saved) == list(PARTS)
        for module, part in PARTS.items():
            assert type(saved.part(module)) is type(part)
            whole = row(part, number)
            torch.testing.assert_close(before[module][number], whole, rtol=0, atol=0)
            rounding = 1e-15 if whole.dtype == torch.float64 else 1e-6
            # Of one dtype, too.
            torch.testing.assert_close(saved[module], scale * whole, rtol=rounding, atol=rounding)
    assert {path.name for path in tmp_path.iterdir()} == {"merged"}


def test_the_forms_on_disk_are_those_of_the_documentation(out, tmp_path):
    parts = {"all": gaussian(5, 7), "each": gaussian(3, 5, 7)}
    names = [
        (out / "average", {"A", "B", "scaling"}),
        (out / "emr", {"unified", "mask", "rescaler"}),
        (save_parts(tmp_path / "shared", {"w": parts["all"]}), {"shared"}),
        (save_parts(tmp_path / "rows", {"w": parts["each"]}), {"rows"}),
    ]
    for directory, wanted in names:
        for path in (directory / "updates").iterdir():
            assert set(load_file(path)) == wanted


def test_emr_stores_a_float_and_a_bit_for_each_task_per_entry(out):
    merged = MergedUpdate(out / "emr", "kind")
    stored = sum(path.stat().st_size for path in (out / "emr" / "updates").iterdir())
    entries = [merged[module].numel() for module in merged]
    payload = sum(4 * n + len(TASKS) * ((n + 7) // 8) + 4 * len(TASKS) for n in entries)
    assert payload <= stored <= payload + 400 * len(entries)
    # Dense updates for each task would be larger by far.
    assert stored < 0.6 * sum(4 * n * len(TASKS) for n in entries)


def repeat(recipe: Path, target: Path, **options) -> Path:
    run(MergeConfig(from_recipe=str(recipe), output_dir=str(target), **options))
    return target / recipe.parent.name


@pytest.mark.parametrize("method", BLIND)
def test_a_recipe_repeats_the_merge_byte_for_byte(method, out, tmp_path):
    again = repeat(out / method / "recipe.json", tmp_path / "again", no_eval=True)
    assert written(again) == written(out / method)
    assert (again / "recipe.json").read_text() == (out / method / "recipe.json").read_text()


def test_a_recipe_repeats_flags_too(paths, tmp_path):
    options = {"weights": ["kind=0.5"], "scale": 0.7, "dtype": "float64"}
    methods = ["dare_linear", "ties", "core_space", "tsv"]
    out = merge_them(paths, tmp_path, methods=methods, no_eval=True, **options)
    for method in methods:
        again = repeat(out / method / "recipe.json", tmp_path / f"{method} again", no_eval=True)
        assert written(again) == written(out / method)


def test_a_recipe_of_methods_that_look_at_data_repeats_it(
    tiny, tiny_data, tmp_path, monkeypatch, tmp_path_factory
):
    paths = {
        task: make_adapter(tiny["roberta"], tmp_path / task, 2, seed, target_modules=["query"])
        for seed, task in enumerate(("rte", "sst2"))
    }
    data = {"data_dir": str(tiny_data), "max_test_samples": 4}
    methods = ["fisher", "regmean"]
    few = {"max_num_samples": 5, "count_padding": True}

    def forget():
        cache = tmp_path_factory.mktemp("cache")
        monkeypatch.setattr("osrm.bank.cache_dir", lambda: cache)

    forget()
    out = merge_them(paths, tmp_path, methods=methods, **few, **data)
    every = merge_them(paths, tmp_path, "every", methods=methods, **data)
    for method in methods:
        assert written(every / method) != written(out / method), "the examples do not show"
        forget()
        again = repeat(out / method / "recipe.json", tmp_path / f"{method} again", **data)
        assert written(again) == written(out / method), method


def test_a_recipe_knows_the_base_of_dense_checkpoints(tiny, tmp_path):
    adapter = make_adapter(tiny["roberta"], tmp_path / "a", 2, 0, target_modules=["query"])
    base = AutoModelForSequenceClassification.from_pretrained(tiny["roberta"])
    dense = PeftModel.from_pretrained(base, adapter).merge_and_unload()
    dense.save_pretrained(tmp_path / "dense")
    options = {"methods": ["average"], "backbone": str(tiny["roberta"]), "no_eval": True}
    out = merge_them({"polite": str(tmp_path / "dense")}, tmp_path, **options)
    again = repeat(out / "average" / "recipe.json", tmp_path / "again", no_eval=True)
    assert written(again) == written(out / "average")


def test_a_dense_checkpoint_may_have_a_norms_old_names(tiny, tmp_path):
    """transformers saves a model under the names of its base's file, if it was loaded from one."""
    model = AutoModelForSequenceClassification.from_pretrained(tiny["roberta"])
    model.state_dict()["roberta.encoder.layer.0.attention.self.query.weight"].add_(1)
    options = {"methods": ["average"], "backbone": str(tiny["roberta"]), "no_eval": True}
    model.save_pretrained(tmp_path / "dense")
    expected = merge_them({"polite": tmp_path / "dense"}, tmp_path, "new", **options)
    rename_norms(tmp_path / "dense" / "model.safetensors")
    found = merge_them({"polite": tmp_path / "dense"}, tmp_path, "old", **options)
    assert written(found / "average") == written(expected / "average")


@pytest.mark.parametrize("damage", ["change", "configure", "remove"])
def test_a_recipe_of_changed_inputs_is_refused_by_name(damage, tiny, tmp_path):
    paths = {
        task: make_adapter(tiny["roberta"], tmp_path / task, 2, seed, target_modules=["query"])
        for seed, task in enumerate(("polite", "brief"))
    }
    out = merge_them(paths, tmp_path, methods=["average"], no_eval=True)
    if damage == "change":
        file = tmp_path / "brief" / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    elif damage == "configure":
        file = tmp_path / "brief" / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": 99}))
    else:
        (tmp_path / "brief").rename(tmp_path / "away")
    with pytest.raises(UserError, match="'brief'") as caught:
        repeat(out / "average" / "recipe.json", tmp_path / "again", no_eval=True)
    assert "\n" not in str(caught.value) and "polite" not in str(caught.value)
    assert not (tmp_path / "again").exists()
